"""What may die while a guest is frozen, many times over: python -m tests.vm.faults [--count N] [--only KIND] ...

Each round freezes the root file system, with the journal and the agent's own files on it, and three data disks, does
one harm, and lets the guest's own writers tell when everything thawed. The figures go to stdout, a line a round, and
the exit status is 1 if any round missed its bound.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ballast.host.agent import Agent
from ballast.wire.errors import AgentError
from ballast.wire.names import QuiesceEnded
from tests.lab.guest import Guest
from tests.vm.conftest import TOKEN, boot

WITNESS = Path(__file__).parent / "witness.py"
IN_GUEST, SAID, GO = "/run/lab-witness.py", "/run/lab-witness.said", "/run/lab-witness.go"
MOUNTPOINTS = ["/", "/mnt/data1", "/mnt/data2", "/mnt/data0"]
LONG_LEASE_MS, SHORT_LEASE_MS = 30_000, 2_000


@dataclass(frozen=True, slots=True)
class Kind:
    """A harm, the lease, the bound in seconds from the harm to the last thaw, and what the end must say."""

    harm: str
    lease_ms: int
    bound_s: float
    reasons: tuple[str | None, ...]


KINDS = {
    "agent-killed": Kind("kill-agent", LONG_LEASE_MS, 1.0, ("agent-restarted",)),
    "guard-killed": Kind("kill-guard", LONG_LEASE_MS, 1.0, ("guard-lost",)),
    "guard-stopped": Kind("stop-guard", SHORT_LEASE_MS, SHORT_LEASE_MS / 1000 + 7, ("lease-expired", "guard-lost")),
    "host-gone": Kind("none", SHORT_LEASE_MS, SHORT_LEASE_MS / 1000 + 1, ("lease-expired",)),
    "host-gone-ended-by-another": Kind("none", LONG_LEASE_MS, 5.0, (None,)),
    "writer-parked": Kind("park", SHORT_LEASE_MS, SHORT_LEASE_MS / 1000 + 1, ("lease-expired",)),
    "writer-parked-guard-killed": Kind("park+kill-guard", SHORT_LEASE_MS, 1.0, ("guard-lost", "lease-expired")),
    "writer-parked-agent-killed": Kind("park+kill-agent", SHORT_LEASE_MS, 1.0, ("agent-restarted",)),
}


class RoundFailed(Exception):
    """A round that did not end as it must."""


def run_round(guest: Guest, name: str) -> dict[str, Any]:
    """One round; RoundFailed if it missed its bound or anything is left behind."""
    kind = KINDS[name]
    session_id = str(uuid.uuid4())
    started_s = time.monotonic()
    try:
        with _watching(guest, kind.harm) as report:
            asyncio.run(_freeze_and_leave(guest, name, session_id))
    except (AgentError, OSError) as error:
        raise RoundFailed(f"the freeze failed: {error!r}") from error
    seen = report()
    ended = asyncio.run(_ask_for_the_end(guest, session_id))
    result = {"kind": name, **seen, "reason": ended.reason, "seconds": round(time.monotonic() - started_s, 1)}
    worst_s = max(max(seen["thawed_s"].values()), *seen.get("parked_thawed_s", {"": 0.0}).values())
    result["worst_s"] = worst_s
    if worst_s > kind.bound_s:
        raise RoundFailed(f"thawed after {worst_s} s, bound {kind.bound_s}: {result}")
    if ended.reason not in kind.reasons or ended.held != (ended.reason is None):
        raise RoundFailed(f"the end says {ended}")
    _check_nothing_left(guest)
    return result


@contextlib.contextmanager
def _watching(guest: Guest, harm: str) -> Iterator[Callable[[], dict[str, Any]]]:
    """Run the witness beside the block, which begins when the witness is ready."""
    guest.run(["rm", "-f", SAID, GO])
    script = f"/usr/bin/python3 -IB {IN_GUEST} {harm} {' '.join(MOUNTPOINTS)} | tee {SAID} | tail -n 1"
    output: list[Any] = []

    def run() -> None:
        try:
            output.append(guest.run(["/bin/bash", "-c", script], timeout_s=120))
        except Exception as error:  # noqa: BLE001 - raised in the main thread, by report()
            output.append(error)

    thread = threading.Thread(target=run)
    thread.start()

    def report() -> dict[str, Any]:
        thread.join(150)
        if not output or isinstance(output[0], Exception):
            raise RoundFailed(f"the witness failed: {output}\n{_circumstances(guest)}")
        try:
            return dict(json.loads(output[0].stdout))
        except ValueError as error:
            raise RoundFailed(f"the witness said {output[0]}") from error

    _wait_for_word(guest, "ready")
    try:
        yield report
    finally:
        thread.join(150)


def _circumstances(guest: Guest) -> str:
    """What there is to see after a failure."""
    script = f"cat {SAID}; ps -eLo stat,tid,wchan:32,comm | grep -v '^[SI]'; journalctl -u 'ballast-*' -n 30 --no-pager"
    return guest.run(["/bin/bash", "-c", script], check=False).stdout


def _wait_for_word(guest: Guest, word: str) -> None:
    guest.run(f"until grep -q {word} {SAID} 2>/dev/null; do sleep 0.02; done", timeout_s=30)


async def _freeze_and_leave(guest: Guest, name: str, session_id: str) -> None:
    """Freeze over vsock, hang up and let the harm be done; a freeze that must fail by the lease does."""
    try:
        async with _connect(guest) as agent:
            await agent.quiesce_begin(session_id, KINDS[name].lease_ms)
    except (AgentError, ConnectionError, OSError):
        if not name.startswith("writer-parked"):
            raise
    await asyncio.to_thread(guest.run, ["touch", GO])
    if name == "host-gone-ended-by-another":
        await asyncio.to_thread(_wait_for_word, guest, "frozen")
        async with Agent.connect(f"unix:{guest.ballast_port}") as agent:
            if not (await agent.quiesce_end(session_id)).held:
                raise RoundFailed("it did not hold")


def _connect(guest: Guest) -> AbstractAsyncContextManager[Agent]:
    return Agent.connect(f"unix:{guest.vsock_path}?connect=640", token=TOKEN)


async def _ask_for_the_end(guest: Guest, session_id: str) -> QuiesceEnded:
    """Ask whether it held, of an agent that may just be starting again."""
    deadline_s = time.monotonic() + 90
    while True:
        try:
            async with _connect(guest) as agent:
                if (await agent.quiesce_status()).state == "thawed":
                    return await agent.quiesce_end(session_id)
                problem: Exception = RoundFailed("it is not thawed")
        except (AgentError, OSError) as error:
            problem = error
        if time.monotonic() > deadline_s:
            raise RoundFailed(f"no end to be had: {problem}") from problem
        await asyncio.sleep(0.2)


def _check_nothing_left(guest: Guest) -> None:
    """Nothing frozen, nobody asleep in the kernel, agent and guard well, the journal on its disk again."""
    touched = " ".join(f"{point}/.checked" for point in MOUNTPOINTS)
    guest.run(f"touch {touched} && rm {touched}", timeout_s=20)
    script = "ps -eo stat=,pid=,comm= | grep '^D' || true"
    deadline_s = time.monotonic() + 10
    while stuck := guest.run(script).stdout:
        if time.monotonic() > deadline_s:
            raise RoundFailed(f"asleep in the kernel: {stuck}")
    guest.run("until systemctl is-active -q ballast-agent; do sleep 0.1; done", timeout_s=30)


def prepare(guest: Guest) -> None:
    """Put the witness into the guest."""
    guest.put(IN_GUEST, WITNESS.read_bytes())


def main() -> int:
    """Run the campaign."""
    parser = argparse.ArgumentParser(prog="python -m tests.vm.faults", description=__doc__)
    parser.add_argument("--count", type=int, default=20, help="rounds of each kind (20)")
    parser.add_argument("--only", choices=list(KINDS), action="append", help="only this kind; may be repeated")
    options = parser.parse_args()
    failures = 0
    with boot("trixie") as guest:
        prepare(guest)
        for name in options.only or KINDS:
            worst_s = []
            for number in range(options.count):
                try:
                    result = run_round(guest, name)
                except RoundFailed as error:
                    failures += 1
                    sys.stdout.write(f"{name} {number + 1}: FAILED: {error}\n")
                    sys.stdout.flush()
                    continue
                worst_s.append(result["worst_s"])
                sys.stdout.write(json.dumps(result) + "\n")
                sys.stdout.flush()
            if worst_s:
                sys.stdout.write(
                    f"{name}: {len(worst_s)} rounds, worst {max(worst_s):.2f} s, bound {KINDS[name].bound_s} s\n"
                )
    sys.stdout.write(f"{failures} failed\n")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
