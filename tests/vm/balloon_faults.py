"""What may happen between the guest's answer and the host's hole: python -m tests.vm.balloon_faults [--count N] ...

Each round the guest takes a chunk and names it, then one harm is done, and a checker in the guest fills all memory that
has come free, the chunk's too if it has. Then the host goes on: in every other round as ballastctl does, in the rest
as one that neither hears events nor asks for the boot id, so that only the look for zeros protects the guest. A round
fails if one page in the guest changed. The figures go to stdout, a line a round; the exit status is 1 if any failed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from ballast.host import linux
from ballast.host.agent import Agent
from ballast.host.machine import NotReclaimable
from ballast.host.qemu import Qemu
from ballast.host.reclaim import NOTHING, ChunkVoid, Reclaim, Released, release
from ballast.wire.errors import AgentError
from ballast.wire.memory_names import BalloonInflated
from tests.lab.guest import CommandFailed, Guest
from tests.lab.image import build
from tests.vm.conftest import TOKEN, packages

CHECKER = Path(__file__).parent / "checker.py"
IN_GUEST, ORDERS, ANSWERS = "/usr/local/lib/lab-checker.py", "/run/lab-checker.in", "/run/lab-checker.out"
MEMORY_BYTES = 704 << 20  # from about 512 MiB on Linux uses huge pages by itself
CHUNK_BYTES = 32 << 20
# What the checker leaves free: before, enough that the balloon's floor leaves room for a chunk; then next to nothing,
# so that whatever came free is filled; and for pressure so much available.
LEFT_BEFORE_MIB, LEFT_AFTER_MIB, PRESSED_MIB = 150, 12, 28
BOOT_S = 12.0
CGROUPS = "/sys/fs/cgroup/ballast.slice"
# For many rounds in little time: the balloon tries again at once after it gave way, its floor is low, so that little
# memory has to be filled again in each round, and a killed agent is back soon.
HURRY = r"""
cd /usr/lib/ballast/ballast/guest/memory
sed -i 's/^HOLD_OFF_S = .*/HOLD_OFF_S = 0.0/' balloon.py
sed -i 's/^def floor_bytes(.*/&\n    return 64 << 20/' floor.py
/usr/bin/python3 -m compileall -q balloon.py floor.py
mkdir -p /etc/systemd/system/ballast-agent.service.d
printf '[Service]\nRestartSec=0\n' >/etc/systemd/system/ballast-agent.service.d/hurry.conf
systemctl daemon-reload
systemctl restart ballast-agent
# For huge pages Linux keeps so much free that a checker which leaves less is killed.
echo vm.min_free_kbytes=3072 >/etc/sysctl.d/lab.conf
sysctl -qp /etc/sysctl.d/lab.conf
# A boot after a reset takes half as long without what nobody here needs, drivers of the board above all.
mkdir -p /etc/systemd/system/systemd-udev-trigger.service.d
cat >/etc/systemd/system/systemd-udev-trigger.service.d/hurry.conf <<'END'
[Service]
ExecStart=
ExecStart=udevadm trigger --action=add -s virtio -s virtio-ports -s block -s memory -s mem -s tty -s misc
END
systemctl -q mask systemd-journal-flush modprobe@configfs modprobe@fuse systemd-random-seed systemd-remount-fs \
    sys-kernel-{config,debug,tracing}.mount sys-fs-fuse-connections.mount dev-mqueue.mount run-lock.mount \
    systemd-tmpfiles-setup-dev-early systemd-udev-load-credentials systemd-user-sessions
sync
"""

KINDS = ("holder-killed", "agent-killed", "both-killed", "deflated", "pressure", "reset")


class RoundFailed(Exception):
    """A round in which the guest lost something, or did not go on as it must."""


@contextlib.contextmanager
def boot() -> Iterator[Guest]:
    """A small guest with agent and checker: what comes free in it is soon given to somebody else."""
    with Guest(build("trixie"), token=TOKEN, memory_bytes=MEMORY_BYTES) as guest:
        guest.wait_boot()
        guest.install(packages())
        guest.put(IN_GUEST, CHECKER.read_bytes())
        guest.run(HURRY, timeout_s=60)
        start_checker(guest)
        yield guest


def start_checker(guest: Guest) -> None:
    """Start it, and wait until it listens."""
    said = "/run/lab-checker.said"
    guest.run(f"setsid /usr/bin/python3 -IB {IN_GUEST} {ORDERS} {ANSWERS} >{said} 2>&1 </dev/null & disown")
    guest.run(f"until grep -q ready {said}; do sleep 0.05; done", timeout_s=60)


def order(guest: Guest, text: str) -> dict[str, Any]:
    """Have the checker do something, and take its answer."""
    answer = guest.run(f"echo {text} >{ORDERS}; timeout 90 cat {ANSWERS}", timeout_s=120).stdout
    return dict(json.loads(answer))


@asynccontextmanager
async def connected(guest: Guest) -> AsyncIterator[Agent]:
    """The agent, which may be starting again; by virtio-serial, since vhost-device-vsock survives no reset."""
    deadline_s = time.monotonic() + 60
    while True:
        try:
            async with Agent.connect(f"unix:{guest.ballast_port}") as agent:
                yield agent
                return
        except (AgentError, OSError):
            if time.monotonic() > deadline_s:
                raise
        await asyncio.sleep(0.1)


def run_round(guest: Guest, kind: str, number: int) -> dict[str, Any]:
    """One round; RoundFailed if the guest lost anything."""
    started_s = time.monotonic()
    this = _Round(guest, kind, is_careful=number % 2 == 0)
    try:
        result = asyncio.run(this.run_reset(is_late=number % 4 == 1) if kind == "reset" else this.run())
    except (AgentError, CommandFailed, OSError, ValueError) as error:  # the last: the checker said nothing
        raise RoundFailed(f"{error!r}\n{guest.console_tail()}") from error
    return {"kind": kind, "number": number, **result, "seconds": round(time.monotonic() - started_s, 1)}


class _Round:
    """Chunk, harm, hole, and a look at every page."""

    def __init__(self, guest: Guest, kind: str, *, is_careful: bool) -> None:
        self._guest = guest
        self._kind = kind
        self._is_careful = is_careful

    async def run(self) -> dict[str, Any]:
        guest = self._guest
        self._make_room()
        async with Qemu.connect(str(guest.qmp_path), ["vsock"]) as machine:
            if self._kind == "pressure":
                await self._take_and_ack(2)
            async with _agent(guest) as agent:
                reclaim = Reclaim(agent, machine)
                await reclaim.begin()
                reply = await _take(reclaim, (await agent.memory_status()).balloon.bytes + CHUNK_BYTES)
                await self._harm(agent)
                held = order(guest, f"grab {LEFT_AFTER_MIB}")
                released, void = await self._go_on(machine, reclaim, reply)
                checked = order(guest, "check")
            if checked["bad"]:
                raise RoundFailed(f"{len(checked['bad'])} pages have changed: {checked['bad'][:5]}; {reply.ranges}")
            await self._settle(reply, released)
        return {"careful": self._is_careful, "held-mib": held["pages"] // 256, **released, "void": void}

    async def run_reset(self, *, is_late: bool) -> dict[str, Any]:
        """The same with a guest that begins anew: the hole comes somewhere in its boot, or when all is filled again."""
        guest = self._guest
        self._make_room()
        async with Qemu.connect(str(guest.qmp_path), ["vsock"]) as machine, connected(guest) as agent:
            reclaim = Reclaim(agent, machine)
            await reclaim.begin()
            reply = await _take(reclaim, CHUNK_BYTES)
            guest.qmp("system_reset")
            early = ({"punched": 0, "not-zero": 0}, "")
            if not is_late:
                await asyncio.sleep(random.uniform(0, BOOT_S))  # a time of its boot that nobody chose
                early = await self._go_on(machine, reclaim, reply)
            await asyncio.to_thread(guest.wait_boot)
            start_checker(guest)
            held = order(guest, f"grab {LEFT_AFTER_MIB}")
            released, void = await self._go_on(machine, reclaim, reply) if is_late else early
            checked = order(guest, "check")
        if checked["bad"]:
            raise RoundFailed(f"{len(checked['bad'])} pages have changed: {checked['bad'][:5]}; {reply.ranges}")
        self._check_health()
        return {"careful": self._is_careful, "held-mib": held["pages"] // 256, **released, "void": void}

    def _make_room(self) -> None:
        """Data in all memory but what the balloon's floor and a chunk take."""
        order(self._guest, f"grab {LEFT_BEFORE_MIB}")
        order(self._guest, f"drop {LEFT_BEFORE_MIB}")

    async def _go_on(self, machine: Qemu, reclaim: Reclaim, reply: BalloonInflated) -> tuple[dict[str, int], str]:
        """Punch, as a host does that takes care, or as one that does not."""
        released, void = NOTHING, ""
        if self._is_careful:
            with contextlib.suppress(OSError):
                try:
                    released = await reclaim.punch(reply)
                except (ChunkVoid, NotReclaimable, AgentError) as error:
                    void = type(error).__name__
        else:
            released = release((await machine.memory()).locate(reply.ranges))
        return _figures(released), void

    async def _harm(self, agent: Agent) -> None:
        guest = self._guest
        if self._kind == "deflated":
            async with _agent(guest) as other:
                await other.balloon_deflate(0)
        elif self._kind == "pressure":
            await self._press(agent)
        else:
            names = {"holder-killed": ["balloon"], "agent-killed": ["agent"]}.get(self._kind, ["balloon", "agent"])
            pids = " ".join(f"$(cat {CGROUPS}/ballast-{name}.service/cgroup.procs)" for name in names)
            guest.run(f'pids="{pids}"; kill -9 $pids; for pid in $pids; do while kill -0 $pid; do :; done; done 2>&-')

    async def _press(self, agent: Agent) -> None:
        """Use memory until the guest gives way by itself; of the chunk without an ack it must not."""
        before_bytes = (await agent.memory_status()).balloon.bytes
        deadline_s = time.monotonic() + 30
        order(self._guest, f"press {PRESSED_MIB}")
        while (await agent.memory_status()).balloon.bytes == before_bytes:
            if time.monotonic() > deadline_s:
                raise RoundFailed("the balloon does not give way")
            order(self._guest, f"press {PRESSED_MIB}")

    async def _take_and_ack(self, chunks: int) -> None:
        async with _agent(self._guest) as agent:
            for number in range(1, chunks + 1):
                reply = await agent.balloon_inflate(number * CHUNK_BYTES)
                if reply.chunk is not None:
                    await agent.balloon_ack(reply.chunk, 0)

    async def _settle(self, reply: BalloonInflated, released: dict[str, int]) -> None:
        """Back to where the round began, with all that the guest had."""
        order(self._guest, f"drop {LEFT_BEFORE_MIB}")  # without room an agent takes a quarter of a minute to start
        async with connected(self._guest) as agent:
            with contextlib.suppress(AgentError):
                if reply.chunk is not None:
                    await agent.balloon_ack(reply.chunk, released["punched"])
            await agent.balloon_deflate(0)
        self._check_health()

    def _check_health(self) -> None:
        trouble = self._guest.run("dmesg | grep -E 'BUG|Oops|Bad page|general protection|segfault' || true").stdout
        if trouble:
            raise RoundFailed(f"the guest's kernel complains: {trouble}")


async def _take(reclaim: Reclaim, target_bytes: int) -> BalloonInflated:
    reply = await reclaim.inflate(target_bytes)
    if reply.chunk is None:
        raise RoundFailed(f"no chunk was taken: {reply}")
    return reply


def _figures(released: Released) -> dict[str, int]:
    return {"punched": released.punched_bytes, "not-zero": released.not_zero_bytes}


def _agent(guest: Guest) -> contextlib.AbstractAsyncContextManager[Agent]:
    return Agent.connect(f"unix:{guest.vsock_path}?connect=640", token=TOKEN)


def main() -> int:
    """Run the campaign."""
    parser = argparse.ArgumentParser(prog="python -m tests.vm.balloon_faults", description=__doc__)
    parser.add_argument("--count", type=int, default=200, help="rounds of each kind (200)")
    parser.add_argument("--only", choices=KINDS, action="append", help="only this kind; may be repeated")
    parser.add_argument("--without-zero-check", action="store_true", help="punch whatever is there: it must then fail")
    options = parser.parse_args()
    if options.without_zero_check:
        linux.is_zero = lambda *_: True
    failures = 0
    with boot() as guest:
        for kind in options.only or KINDS:
            failed = 0
            for number in range(options.count):
                try:
                    line = json.dumps(run_round(guest, kind, number))
                except RoundFailed as error:
                    failed += 1
                    line = f"{kind} {number}: FAILED: {error}"
                sys.stdout.write(line + "\n")
                sys.stdout.flush()
            sys.stdout.write(f"{kind}: {options.count} rounds, {failed} failed\n")
            failures += failed
    sys.stdout.write(f"{failures} failed\n")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
