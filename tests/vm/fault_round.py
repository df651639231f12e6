"""One round of the fault campaign: freeze, one harm, and everything well again in time."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

from ballast.host.agent import Agent
from ballast.wire.errors import AgentError, KernelFailure
from ballast.wire.names import QuiesceEnded
from tests.lab.guest import CommandFailed, Guest
from tests.vm.conftest import DIST, NEXT, TOKEN, packages
from tests.vm.fault_kinds import KINDS, LOOP_FILE, MOUNTPOINTS, TIMER, Variant
from tests.vm.fault_writers import CONSOLE, LEVELS, LOG, TROUBLE, complaint, program
from tests.vm.raw import Raw, request

WITNESS = Path(__file__).with_name("witness.py")
IN_GUEST, SAID, GO = "/run/lab-witness.py", "/run/lab-witness.said", "/run/lab-witness.go"
WRITERS_D, UNITS = "/etc/ballast/writers.d", "/run/systemd/system"
HOOKS = f"{WRITERS_D}/qemu-hooks"  # the lab's guests have the stock hook: that looking for others takes a second
BALLOON_BYTES = 4 << 20
INFLATE_S = 30.0  # an agent that has lost its holder takes nothing for a while
CUT_S = 0.3  # the channel is cut at some time between a request and its answer
ROUND_S, SHUTDOWN_S = 150, 120
TIMER_UNITS = {
    TIMER: "[Timer]\nOnCalendar=*:*:*\nPersistent=true\nAccuracySec=1us\n",
    TIMER.replace(".timer", ".service"): "[Unit]\nStartLimitIntervalSec=0\n[Service]\nType=oneshot\nExecStart=true\n",
}
# Each waits for the end of what may take a moment, and for no longer than the command's time-out.
LEFT = f"""
until ! ls /run/ballast/writers/* /sys/fs/cgroup/ballast.slice/ballast-writer-* >/dev/null 2>&1; do sleep 0.1; done
for point in {" ".join(MOUNTPOINTS)}; do touch $point/.checked; rm $point/.checked; done
while ps -eo stat= | grep -q ^D; do sleep 0.05; done
until systemctl is-active -q ballast-agent; do sleep 0.1; done
until grep -qx 0 /sys/kernel/rcu_expedited && grep -qx 20 /proc/sys/vm/dirty_ratio; do sleep 0.1; done
cat {LOG}
"""
CIRCUMSTANCES = f"""
cat {SAID} {LOG}
ps -eLo stat,tid,wchan:32,args | grep -v '^[SI]'
ls -l /run/ballast/writers /run/ballast; cat /run/ballast/quiesce.json
journalctl -u 'ballast-*' -n 60 --no-pager
"""


class RoundFailed(Exception):
    """A round that did not end as it must."""


def prepare(guest: Guest) -> None:
    """Put into the guest what the rounds need; again after each boot."""
    guest.put(IN_GUEST, WITNESS.read_bytes())
    for name in LEVELS:
        guest.put(f"{WRITERS_D}/{name}", program(name), 0o755)
    for name, text in TIMER_UNITS.items():
        guest.put(f"{UNITS}/{name}", text.encode())
    for folder in (DIST, NEXT):
        for deb in packages(folder):
            guest.put(f"/run/install/{folder.name}/{deb.name}", deb.read_bytes())
    guest.run(
        f"ln -sf /dev/null {HOOKS}; systemctl daemon-reload; [ -e {LOOP_FILE} ] || "
        f"{{ truncate -s 32M {LOOP_FILE}; mkfs.ext4 -q {LOOP_FILE}; }}; sync",
        timeout_s=60,
    )


def clear(guest: Guest) -> None:
    """Take it out again."""
    files = " ".join(f"{WRITERS_D}/{name}" for name in LEVELS) + " " + " ".join(f"{m}/.witness" for m in MOUNTPOINTS)
    guest.run(f"rm -rf {files} {HOOKS} {LOOP_FILE} /run/install /run/lab-* {UNITS}/lab-*; systemctl daemon-reload")


def run_round(guest: Guest, name: str, dice: random.Random) -> dict[str, Any]:
    """One round; its figures. RoundFailed if it missed its bound or anything is left behind."""
    number = dice.randrange(len(KINDS[name]))
    variant = KINDS[name][number]
    started_s = time.monotonic()
    trouble = f"echo '{variant.trouble}' >{TROUBLE}" if variant.trouble else f"rm -f {TROUBLE}"
    try:
        guest.run(f"rm -f {SAID} {GO}; : >{LOG}; {trouble}\n{variant.before}", timeout_s=60)
        if name == "rebooted":
            figures = _run_reboot(guest, variant)
        elif variant.is_refused:
            figures = _run_refused(guest)
        else:
            figures = _run_harm(guest, variant, dice)
        told = guest.run(f"{variant.after}\n{LEFT}", timeout_s=ROUND_S).stdout.splitlines()
        if problem := complaint(figures.pop("told", told), in_order=not variant.trouble and not variant.is_parked):
            raise RoundFailed(problem)
    except (RoundFailed, AgentError, CommandFailed, TimeoutError) as error:
        raise RoundFailed(f"variant {number}: {error!r}\n{_rescue(guest, variant)}") from error
    return {"kind": name, "variant": number, **figures, "seconds": round(time.monotonic() - started_s, 1)}


def _rescue(guest: Guest, variant: Variant) -> str:
    """What there is to see after a failure; and the guest is made fit for the next round, as far as that goes."""
    seen = guest.run(["/bin/bash", "-c", CIRCUMSTANCES], check=False).stdout
    thaw = "\n".join(f"fsfreeze -u {point} 2>/dev/null" for point in variant.mountpoints)
    guest.run(["/bin/bash", "-c", f"{thaw}\n{variant.after}"], timeout_s=60, check=False)
    return seen


def _run_harm(guest: Guest, variant: Variant, dice: random.Random) -> dict[str, Any]:
    session_id = str(uuid.uuid4())
    with _watching(guest, variant) as report:
        asyncio.run(_freeze_and_leave(guest, variant, session_id, dice))
    figures = report()
    ended = asyncio.run(_ask_for_the_end(guest, variant, session_id))
    worst_s = max(max(figures["thawed_s"].values()), *figures.get("parked_thawed_s", {"": 0.0}).values())
    figures |= {"worst_s": worst_s, "reason": ended.reason}
    if worst_s > variant.bound_s:
        raise RoundFailed(f"thawed after {worst_s} s, bound {variant.bound_s}: {figures}")
    if ended.reason not in variant.reasons or ended.held != (ended.reason is None):
        raise RoundFailed(f"the end says {ended}")
    return figures


def _run_refused(guest: Guest) -> dict[str, Any]:
    """Somebody else has frozen one: there is no freeze, and that one stays frozen."""

    async def begin() -> None:
        async with _connect(guest) as agent:
            await agent.quiesce_begin(str(uuid.uuid4()), 30_000)

    try:
        asyncio.run(begin())
    except KernelFailure:
        return {"worst_s": 0.0, "reason": "refused"}
    raise RoundFailed("a freeze that could not be whole was granted")


def _run_reboot(guest: Guest, variant: Variant) -> dict[str, Any]:
    """The guest shuts down in the middle of a freeze, and comes back."""

    async def begin() -> None:
        async with _connect(guest) as agent:
            await agent.quiesce_begin(str(uuid.uuid4()), variant.lease_ms)

    with contextlib.suppress(TimeoutError):  # resets that nobody waited for
        guest.wait_qmp_event("RESET", timeout_s=0)
    said_before = len(guest.console.read_bytes())

    def told() -> list[str]:
        return CONSOLE.findall(guest.console.read_bytes()[said_before:].decode(errors="replace"))

    asyncio.run(begin())
    started_s = time.monotonic()
    guest.run("setsid systemctl reboot </dev/null >/dev/null 2>&1 &")
    while not any(line.endswith((" thaw", " abort")) for line in told()):  # by then all is thawed
        if time.monotonic() > started_s + variant.bound_s:
            raise RoundFailed(f"nobody was let go within {variant.bound_s} s: {told()}")
        time.sleep(0.02)
    worst_s = round(time.monotonic() - started_s, 3)
    guest.wait_qmp_event("RESET", timeout_s=SHUTDOWN_S)
    guest.wait_boot()
    prepare(guest)
    guest.run(f"touch {LOG}")
    return {"worst_s": worst_s, "reason": "rebooted", "told": told()}


@contextlib.contextmanager
def _watching(guest: Guest, variant: Variant) -> Iterator[Callable[[], dict[str, Any]]]:
    """Run the witness beside the block, which begins when the witness is ready."""
    order = {
        "harms": variant.harms,
        "afterwards": variant.afterwards,
        "mountpoints": variant.mountpoints,
        "parked": variant.is_parked,
    }
    script = f"/usr/bin/python3 -IB {IN_GUEST} '{json.dumps(order)}' 2>&1 | tee {SAID} | tail -n 1"
    output: list[Any] = []

    def run() -> None:
        try:
            output.append(guest.run(["/bin/bash", "-c", script], timeout_s=ROUND_S))
        except Exception as error:  # noqa: BLE001 - raised in the main thread, by report()
            output.append(error)

    thread = threading.Thread(target=run)
    thread.start()

    def report() -> dict[str, Any]:
        if not output or isinstance(output[0], Exception):
            raise RoundFailed(f"the witness failed: {output}")
        try:
            return dict(json.loads(output[0].stdout))
        except ValueError as error:
            raise RoundFailed(f"the witness said {output[0]}") from error

    try:
        _wait_for_word(guest, "ready")
        yield report
    finally:
        thread.join(ROUND_S + 30)


def _wait_for_word(guest: Guest, word: str) -> None:
    guest.run(f"until grep -qx {word} {SAID} 2>/dev/null; do sleep 0.02; done", timeout_s=40)


async def _freeze_and_leave(guest: Guest, variant: Variant, session_id: str, dice: random.Random) -> None:
    """Freeze, hang up and let the harm be done; a freeze that must fail by the lease does."""
    if variant.cuts:
        await asyncio.to_thread(_begin_and_cut, guest, variant, session_id, dice.uniform(0, CUT_S))
        await asyncio.to_thread(_wait_for_word, guest, "frozen")
    else:
        with contextlib.suppress(*((AgentError, ConnectionError) if variant.is_parked else ())):
            await _begin(guest, variant, session_id)
    await asyncio.to_thread(guest.run, ["touch", GO])
    if variant.is_ended:
        await asyncio.to_thread(_wait_for_word, guest, "harmed")
        async with Agent.connect(f"unix:{guest.ballast_port}") as agent:
            await agent.quiesce_end(session_id)


async def _begin(guest: Guest, variant: Variant, session_id: str) -> None:
    async with _connect(guest) as agent:
        if variant.has_balloon:
            await _inflate(agent)
        await agent.quiesce_begin(
            session_id,
            variant.lease_ms,
            mountpoints=None if variant.mountpoints[0] == "/" else variant.mountpoints,
            exclude=variant.exclude or None,
            on_failure="degrade" if variant.is_degraded else None,
        )


async def _inflate(agent: Agent) -> None:
    deadline_s = time.monotonic() + INFLATE_S
    while (chunk := (await agent.balloon_inflate(BALLOON_BYTES)).chunk) is None:
        if time.monotonic() > deadline_s:
            raise RoundFailed("the balloon takes nothing")
        await asyncio.sleep(0.2)
    await agent.balloon_ack(chunk, 0)


def _begin_and_cut(guest: Guest, variant: Variant, session_id: str, after_s: float) -> None:
    """Nobody hears the answer."""
    way = f"unix:{guest.vsock_path}?connect=640" if variant.cuts == "vsock" else f"unix:{guest.ballast_port}"
    with Raw(way) as peer:
        if variant.cuts == "vsock":
            peer.ask("ballast-authenticate", token=TOKEN)
        else:
            peer.ask("guest-ping")
        peer.send(request("ballast-quiesce-begin", id=session_id, lease_ms=variant.lease_ms))
        time.sleep(after_s)


def _connect(guest: Guest) -> AbstractAsyncContextManager[Agent]:
    return Agent.connect(f"unix:{guest.vsock_path}?connect=640", token=TOKEN)


async def _ask_for_the_end(guest: Guest, variant: Variant, session_id: str) -> QuiesceEnded:
    """Ask whether it held, of an agent that may just be starting again."""
    deadline_s = time.monotonic() + 90
    while True:
        try:
            async with _connect(guest) as agent:
                if (await agent.quiesce_status()).state == "thawed":
                    if variant.has_balloon:
                        await agent.balloon_deflate(0)
                    return await agent.quiesce_end(session_id)
                problem: Exception = RoundFailed("it is not thawed")
        except (AgentError, OSError) as error:
            problem = error
        if time.monotonic() > deadline_s:
            raise RoundFailed(f"no end to be had: {problem!r}") from problem
        await asyncio.sleep(0.2)
