"""The demo's end: memory goes back to the host, a DIMM whole and boot memory by the balloon, and comes again."""

import asyncio
import json
import os
import re
import time
from collections.abc import Awaitable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ballast.host import linux
from ballast.host.balloon import Inflation, Outcome
from ballast.host.dimms import Dimm, read_dimms, remove_dimm
from ballast.host.qemu import Qemu
from ballast.host.qmp import Qmp
from ballast.host.reclaim import Reclaim
from tests.lab.demo_growth import STEP_BYTES
from tests.lab.demo_memory import DIMM_BYTES, EVENT_TIMEOUT_S, Ear, Heard, mib
from tests.lab.demo_stage import DemoFailed, Stage, require
from tests.lab.guest import Guest

PROGRAM = "/run/demo/growth.py"
# The lab's vsock reads and writes the rings alone, and pins nothing.
SAFE_VHOST_USER = ("vsock",)
BALLOON_BYTES = 256 << 20
# Measured on the balloon's own memory, and on all: the host cannot gain what the guest had never touched, about 10 MiB
# of its 1 GiB, and meanwhile the guest runs on.
FREED_MIN_BYTES, FALLEN_MIN_BYTES = 250 << 20, 240 << 20
# What the load needs beyond what is available: it ends well only if the balloon gives that much.
BEYOND_BYTES = 128 << 20
GROWTH_TIMEOUT_S = 120.0
FREED_TIMEOUT_S = 20.0


@dataclass(frozen=True, slots=True)
class HostUse:
    """What the guest's memory takes on this host, by the files that back it, and by QEMU's own process."""

    boot_bytes: int
    dimm_bytes: int
    resident_bytes: int


async def read_use(guest: Guest) -> HostUse:
    """Count what is no hole in the files of the guest's memory.

    They are open only meanwhile: an open file would keep a DIMM's memory that QEMU has let go.
    """
    async with Qmp.connect(str(guest.qmp_path)) as qmp:
        pid = qmp.pid
    used_bytes = {True: 0, False: 0}
    for mapping in {one.inode: one for one in linux.read_maps(pid) if "memory-backend-memfd" in one.path}.values():
        fd = linux.open_mapped(pid, mapping)
        try:
            file_bytes = os.fstat(fd).st_size
            used_bytes[file_bytes == DIMM_BYTES] += linux.allocated_bytes(fd, 0, file_bytes)
        finally:
            os.close(fd)
    return HostUse(used_bytes[False], used_bytes[True], read_resident_bytes(pid))


def read_resident_bytes(pid: int) -> int:
    """RssShmem of proc_pid_status(5): pages of shared memory, which the guest's is, that a process has mapped."""
    found = re.search(r"^RssShmem:\s+(\d+) kB$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    if found is None:
        raise DemoFailed("QEMU's /proc/PID/status has no RssShmem")
    return 1024 * int(found[1])


# The DIMM


async def show_unplug(stage: Stage) -> None:
    """The DIMM of the demo's beginning is emptied by the guest and taken out."""
    guest, agent, screen = stage.guest, stage.agent, stage.screen
    before, use = await agent.memory_status(), await read_use(guest)
    require(use.dimm_bytes, "the guest never used the DIMM")
    screen.say(
        f"The load is gone, the writers too: [bold]{mib(before.available_bytes)}[/] of {mib(before.total_bytes)} "
        f"available. On the host the guest takes {mib(use.boot_bytes)} for its boot memory, and {mib(use.dimm_bytes)} "
        "for the DIMM."
    )
    async with Qmp.connect(str(guest.qmp_path)) as qmp:
        (dimm,) = await read_dimms(qmp)
        with screen.working("the guest empties the DIMM"):
            offline_s = await _offline(stage, dimm)
        from_s = time.monotonic()
        removal = await remove_dimm(agent, qmp, dimm)
        unplug_s = time.monotonic() - from_s
    require(removal.result == "removed" and not removal.reason, f"the DIMM does not come off: {removal.reason}")
    after, use_after = await agent.memory_status(), await _see_freed(guest)
    await asyncio.to_thread(guest.bury, dimm.bytes)
    fallen_bytes = use.resident_bytes - use_after.resident_bytes
    screen.say(
        f"device_del, and the guest lets go: out after [bold]{1000 * unplug_s:.0f} ms[/]. MemTotal "
        f"{mib(before.total_bytes)} -> [bold]{mib(after.total_bytes)}[/]; QEMU's resident memory fell by "
        f"[bold]{mib(fallen_bytes)}[/]."
    )
    require(before.total_bytes - after.total_bytes == DIMM_BYTES, f"MemTotal is {after.total_bytes} after the DIMM")
    screen.sum_up("the DIMM unplugged", f"{1000 * offline_s:.0f} ms to offline, {1000 * unplug_s:.0f} ms to unplug")


async def _offline(stage: Stage, dimm: Dimm) -> float:
    """All of its blocks; how long it took, in seconds."""
    from_s = time.monotonic()
    result = await stage.agent.memory_offline(dimm=dimm.address)
    offline_s = time.monotonic() - from_s
    require(all(block.result == "done" for block in result.blocks), f"not all blocks are offline: {result.blocks}")
    stage.screen.say(
        f"All {len(result.blocks)} blocks of the DIMM emptied and offline in [bold]{1000 * offline_s:.0f} ms[/]: what "
        "was in them now is in boot memory."
    )
    return offline_s


async def _see_freed(guest: Guest) -> HostUse:
    """Look until QEMU has no memory of a DIMM any more, which is a moment after it has said so (RCU)."""
    deadline_s = time.monotonic() + FREED_TIMEOUT_S
    while (use := await read_use(guest)).dimm_bytes:
        require(time.monotonic() < deadline_s, f"QEMU keeps {mib(use.dimm_bytes)} of a DIMM that is gone")
        await asyncio.sleep(0.05)
    return use


# The balloon


async def show_balloon(stage: Stage) -> None:
    """Boot memory goes to the host: chunks that the guest pins, and that are punched here when they read as zero."""
    guest, screen = stage.guest, stage.screen
    before, free = await read_use(guest), await stage.agent.memory_status()
    outcome = Outcome(BALLOON_BYTES, 0)
    from_s = time.monotonic()
    with screen.working(f"{mib(BALLOON_BYTES)} of boot memory into the balloon"):
        async with Qemu.connect(str(guest.qmp_path), SAFE_VHOST_USER) as machine:
            reclaim = Reclaim(stage.agent, machine)
            await reclaim.begin()
            await Inflation(reclaim, outcome, finish=_finish, advance=lambda _: None).run()
    took_s = time.monotonic() - from_s
    after, left = await read_use(guest), await stage.agent.memory_status()
    fallen_bytes = before.boot_bytes - after.boot_bytes
    screen.say(
        f"The guest takes {mib(outcome.taken_bytes)} of its free memory out of use, in {outcome.chunks} chunks; the "
        f"host checks that each reads as zero and punches it out of the file, {mib(outcome.freed_bytes)} freed in "
        f"{took_s:.1f} s, [bold]{mib(round(outcome.freed_bytes / took_s))}/s[/]."
    )
    screen.say(
        f"Host's use of its boot memory: {mib(before.boot_bytes)} -> [bold]{mib(after.boot_bytes)}[/], "
        f"{mib(fallen_bytes)} less; by QEMU's resident memory "
        f"{mib(before.resident_bytes - after.resident_bytes)} less. Available in the guest: "
        f"{mib(free.available_bytes)} -> {mib(left.available_bytes)}."
    )
    require(outcome.stopped == "done", f"the balloon stopped at {mib(outcome.total_bytes)}: {outcome.stopped}")
    require(outcome.not_zero_bytes == 0, f"{outcome.not_zero_bytes} bytes of the balloon were not zero")
    require(outcome.freed_bytes >= FREED_MIN_BYTES, f"only {outcome.freed_bytes} bytes of the balloon were the host's")
    require(fallen_bytes >= FALLEN_MIN_BYTES, f"the host has only {fallen_bytes} bytes more")
    screen.sum_up(
        "256 MiB of boot memory given back",
        f"host has {mib(fallen_bytes)} more, {mib(round(outcome.freed_bytes / took_s))}/s",
    )


async def _finish(step: Awaitable[None]) -> None:
    """Nothing has to be finished here: if we are told to leave, the guest goes with us."""
    await step


# The load returns


async def show_return(stage: Stage, ear: Ear) -> None:
    """A program needs more than there is, and the guest takes its memory back by itself."""
    guest, agent, screen = stage.guest, stage.agent, stage.screen
    before, use = await agent.memory_status(), await read_use(guest)
    needed_bytes = before.available_bytes + BEYOND_BYTES
    screen.say(
        f"A program starts that needs {mib(needed_bytes)}, {mib(BEYOND_BYTES)} more than is available. The host does "
        "nothing."
    )
    with screen.working("the program grows"):
        grown, heard = await asyncio.gather(asyncio.to_thread(grow, guest, needed_bytes), _hear_giving_way(ear))
    after, use_after = await agent.memory_status(), await read_use(guest)
    started_s, steps_s = grown["started-s"], grown["steps"]
    gave_way_s, took_s = heard.sent_s - started_s, steps_s[-1] - started_s
    had_bytes = STEP_BYTES * sum(1 for step_s in steps_s if step_s <= heard.sent_s)
    risen_bytes = use_after.boot_bytes - use.boot_bytes
    screen.say(
        f"BALLAST_BALLOON, cause [bold]pressure[/]: [bold]{1000 * gave_way_s:.0f} ms[/] after the start, when the "
        f"program had {mib(had_bytes)}. The balloon went from {mib(before.balloon.bytes)} to "
        f"[bold]{mib(after.balloon.bytes)}[/] by itself."
    )
    screen.say(
        f"The program had all its memory after {took_s:.1f} s, found in it what it had written, and ended well; least "
        f"available meanwhile: {mib(grown['least-available-bytes'])}. Nobody was killed."
    )
    screen.say(
        f"Host's use of its boot memory: {mib(use.boot_bytes)} -> [bold]{mib(use_after.boot_bytes)}[/], "
        f"{mib(risen_bytes)} more."
    )
    require(0 < gave_way_s < GROWTH_TIMEOUT_S, f"the balloon gave way {gave_way_s:.1f} s after the start")
    require(before.balloon.bytes - after.balloon.bytes >= BEYOND_BYTES, f"the balloon holds {after.balloon.bytes}")
    require(grown["wrong"] == 0, f"{grown['wrong']} pages of the program lost what was in them")
    require(risen_bytes >= BEYOND_BYTES, f"the host gave only {risen_bytes} bytes again")
    screen.sum_up("given again as load returned", f"{1000 * gave_way_s:.0f} ms after its start, {mib(risen_bytes)}")


def grow(guest: Guest, needed_bytes: int) -> dict[str, Any]:
    """Run the program to its end, and see that nobody was killed for memory."""
    guest.put(PROGRAM, Path(__file__).with_name("demo_growth.py").read_bytes())
    ended = guest.run(["/usr/bin/python3", "-IB", PROGRAM, str(needed_bytes)], timeout_s=GROWTH_TIMEOUT_S, check=False)
    killed = guest.run("sed -n 's/^oom_kill //p' /proc/vmstat").stdout.strip()
    require(killed == "0", f"the OOM killer has taken {killed} processes")
    require(ended.returncode == 0, f"the program ended with {ended.returncode}: {ended.stderr}")
    told: dict[str, Any] = json.loads(ended.stdout)
    return told


async def _hear_giving_way(ear: Ear) -> Heard:
    """The first event that says so; those of the inflating are still there."""
    while (heard := await ear.next("BALLAST_BALLOON", EVENT_TIMEOUT_S)).event.data["cause"] != "pressure":
        pass
    return heard
