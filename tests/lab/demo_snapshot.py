"""The demo's snapshot: file systems frozen under writers, a QMP snapshot inside the window, and what it holds."""

import asyncio
import json
import struct
import subprocess
import sys
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from ballast.host.show import Table
from ballast.wire.names import QuiesceBegun, QuiesceEnded
from tests.lab.demo_stage import GuestClock, Stage, read_clock, require
from tests.lab.demo_writers import CHUNK_BYTES
from tests.lab.guest import Guest

PROGRAM, LOGS = "/run/demo/writers.py", "/run/demo/writers"
WRITERS_UNIT = "ballast-demo-writers"
WARM_UP_S = 5
AFTERMATH_S = 1.5
LEASE_MS = 20_000
# Of one write that comes back while the next is not begun yet, the guest's log may lack the last.
UNLOGGED_MAX = 1
CHECK_TIMEOUT_S = 180


@dataclass(frozen=True, slots=True)
class Filesystem:
    """One that is frozen: `node` is QEMU's name of its disk, `image` what QEMU has open, of `format`."""

    node: str
    type: str
    mountpoint: str
    image: Path
    format: str


@dataclass(frozen=True, slots=True)
class Window:
    """The moments of the freeze, by the guest's clock in seconds, and what the agent said."""

    asked_s: float
    snapshot_from_s: float
    snapshot_to_s: float
    ended_s: float
    begun: QuiesceBegun
    ended: QuiesceEnded


def filesystems(guest: Guest) -> list[Filesystem]:
    """Root and the data disks."""
    root = Filesystem("root", "ext4", "/", guest.dir / "root.qcow2", "qcow2")
    return [root, *(Filesystem(disk.name, disk.type, disk.mountpoint, disk.path, "raw") for disk in guest.disks)]


# Writers


def start_writers(guest: Guest) -> None:
    """Start a writer on each file system."""
    guest.put(PROGRAM, Path(__file__).with_name("demo_writers.py").read_bytes())
    mountpoints = " ".join(filesystem.mountpoint for filesystem in filesystems(guest))
    guest.run(
        f"mkdir -p {LOGS}; "
        f"systemd-run --quiet --unit={WRITERS_UNIT} /usr/bin/python3 -IB {PROGRAM} {LOGS} {mountpoints}"
    )


def read_times(guest: Guest) -> list[list[float]]:
    """When each writer's writes were done so far, by the guest's clock in seconds."""
    logs = [guest.get(f"{LOGS}/{index}") for index in range(len(guest.disks) + 1)]
    return [[time_s for (time_s,) in struct.iter_unpack("d", log[: len(log) // 8 * 8])] for log in logs]


def longest_gap_s(times: Sequence[float], from_s: float, to_s: float) -> float:
    """The longest time between two writes, of those that lie wholly or partly between these moments."""
    gaps = (later - earlier for earlier, later in pairwise(times) if later >= from_s and earlier <= to_s)
    return max(gaps, default=0.0)


async def show_writers(stage: Stage) -> None:
    """Start them and tell their rate."""
    with stage.screen.working(f"writers run on all four for {WARM_UP_S} s"):
        await asyncio.to_thread(start_writers, stage.guest)
        await asyncio.sleep(WARM_UP_S)  # a rate is what is measured here
        times = await asyncio.to_thread(read_times, stage.guest)
    require(all(len(writes) > 1 for writes in times), f"no writes: {[len(writes) for writes in times]}")
    rates = [len(writes) / (writes[-1] - writes[0]) for writes in times]
    named = ", ".join(
        f"{filesystem.mountpoint} ({filesystem.type}) {rate:.0f}"
        for filesystem, rate in zip(filesystems(stage.guest), rates, strict=True)
    )
    mb_s = sum(rates) * CHUNK_BYTES / 1e6
    stage.screen.say(
        f"A writer on each, buffered, {CHUNK_BYTES >> 10} KiB a write: [bold]{mb_s:.0f} MB/s[/] in all; writes a "
        f"second: {named}."
    )
    stage.screen.say("Each also holds a deleted file open.")
    stage.screen.sum_up("writers, before the freeze", f"{sum(rates):.0f} writes/s, {mb_s:.0f} MB/s")


# The window


def overlay_of(guest: Guest, filesystem: Filesystem) -> Path:
    """Where the guest's writes go after the snapshot."""
    return guest.dir / f"{filesystem.node}-after.qcow2"


def take_snapshot(guest: Guest) -> None:
    """All disks at one moment: from here on what they were is read-only, and writes go to overlays."""
    actions = [
        {
            "type": "blockdev-snapshot-sync",
            "data": {
                "node-name": filesystem.node,
                "snapshot-file": str(overlay_of(guest, filesystem)),
                "snapshot-node-name": f"{filesystem.node}-after",
                "format": "qcow2",
            },
        }
        for filesystem in filesystems(guest)
    ]
    guest.qmp("transaction", actions=actions)


async def show_freeze(stage: Stage) -> list[int]:
    """Freeze, snapshot, thaw. Returns how many writes of each writer were done when it was frozen."""
    guest, screen = stage.guest, stage.screen
    with screen.working("freeze, snapshot, thaw"):
        window = await _freeze(stage, await asyncio.to_thread(read_clock, guest))
        await asyncio.sleep(AFTERMATH_S)  # the writers go on, if they do
        times = await asyncio.to_thread(read_times, guest)
        await asyncio.to_thread(guest.run, ["systemctl", "stop", WRITERS_UNIT])
    begun, ended = window.begun, window.ended
    snapshot_ms = 1000 * (window.snapshot_to_s - window.snapshot_from_s)
    _tell_writers(stage, window, times)
    frozen = [filesystem for filesystem in begun.filesystems if filesystem.state == "frozen"]
    screen.say(
        f"Synced in {begun.sync_ms:.0f} ms, then {len(frozen)} file systems frozen together in "
        f"[bold]{begun.freeze_ms:.0f} ms[/]; the QMP snapshot of four disks took {snapshot_ms:.0f} ms; "
        f"frozen for [bold]{ended.held_ms:.0f} ms[/], thawed in {ended.thaw_ms:.0f} ms."
    )
    screen.say("It [bold]held[/]: all four stayed frozen until we thawed them." if ended.held else "It did not hold.")
    missing = {filesystem.mountpoint for filesystem in filesystems(guest)} - {one.mountpoint for one in frozen}
    require(not missing, f"not frozen: {', '.join(sorted(missing))}; the agent said {begun.filesystems}")
    require(ended.held, f"the freeze did not hold: {ended.reason}")
    screen.sum_up("freeze of four file systems", f"{begun.freeze_ms:.0f} ms, after {begun.sync_ms:.0f} ms of sync")
    screen.sum_up("frozen window", f"{ended.held_ms:.0f} ms, held; snapshot {snapshot_ms:.0f} ms of it")
    return [_done_before(*pair, window) for pair in zip(filesystems(guest), times, strict=True)]


async def _freeze(stage: Stage, clock: GuestClock) -> Window:
    """The window itself: as short as it can be."""
    session_id = str(uuid.uuid4())
    asked_s = time.time()
    begun = await stage.agent.quiesce_begin(session_id, LEASE_MS)
    try:
        from_s = time.time()
        await asyncio.to_thread(take_snapshot, stage.guest)
        to_s = time.time()
    finally:
        ended = await stage.agent.quiesce_end(session_id)
    asked_s, from_s, to_s, ended_s = (moment_s + clock.ahead_s for moment_s in (asked_s, from_s, to_s, time.time()))
    return Window(asked_s, from_s, to_s, ended_s, begun, ended)


def _tell_writers(stage: Stage, window: Window, times: Sequence[Sequence[float]]) -> None:
    """What each file system and its writer went through."""
    freeze_ms = {filesystem.mountpoint: filesystem.freeze_ms for filesystem in window.begun.filesystems}
    rows, stalls_s = [], []
    for filesystem, writes in zip(filesystems(stage.guest), times, strict=True):
        require(writes[-1] > window.ended_s, f"the writer on {filesystem.mountpoint} did not go on after the thaw")
        usual_s = longest_gap_s(writes, writes[0], window.asked_s)
        stalls_s.append(longest_gap_s(writes, window.asked_s, window.ended_s))
        figures = 1000 * usual_s, freeze_ms.get(filesystem.mountpoint, 0.0), 1000 * stalls_s[-1]
        rows.append((filesystem.mountpoint, filesystem.type, *(f"{figure:.0f} ms" for figure in figures)))
    columns = ("file system", "type", "longest gap before", "froze in", "longest gap across the freeze")
    stage.screen.table(Table("The writers", rows, columns))
    stage.screen.sum_up("writers' longest stall", f"{1000 * max(stalls_s):.0f} ms")


def _done_before(filesystem: Filesystem, writes: Sequence[float], window: Window) -> int:
    """Writes that were done when the snapshot began. DemoFailed if one was done while it was taken."""
    before = sum(1 for time_s in writes if time_s <= window.snapshot_from_s)
    through = sum(1 for time_s in writes if time_s <= window.snapshot_to_s) - before
    require(through == 0, f"{through} writes went through on the frozen {filesystem.mountpoint}")
    return before


# The file systems in it


async def show_clean(stage: Stage, done: Sequence[int]) -> None:
    """Every file system of the snapshot, on a copy: mounted once, then checked."""
    screen = stage.screen
    with screen.working("copying the snapshot, mounting each copy once, checking it"):
        found = await asyncio.gather(*(_inspect(stage.guest, one) for one in filesystems(stage.guest)))
    rows, complaints = [], []
    for filesystem, result, expected in zip(filesystems(stage.guest), found, done, strict=True):
        last = result["numbers"][1] + 1
        rows.append(
            (
                f"{filesystem.mountpoint} ({filesystem.type})",
                "clean" if result["before"] == 0 else f"complains ({result['before']})",
                "clean" if result["after"] == 0 else f"failed ({result['after']})",
                f"{last} of {expected}",
            )
        )
        if result["after"] != 0:
            complaints.append(f"{filesystem.mountpoint} is not clean: {result['said']}")
        if not expected <= last <= expected + UNLOGGED_MAX or result["gaps"]:
            complaints.append(f"{filesystem.mountpoint} has {last} writes and {result['gaps']} gaps, not {expected}")
        if result["deleted"]:
            complaints.append(f"{filesystem.mountpoint}: the deleted file is back")
    columns = ("file system", "as frozen", "mounted once", "finished writes in it")
    screen.table(Table("The snapshot, by e2fsck -fn, xfs_repair -n and btrfs check", rows, columns))
    screen.say("As frozen, the deleted files that were open still show; mounting once cleans them up.")
    require(not complaints, "\n".join(complaints))
    screen.sum_up("snapshot", f"{len(rows)} file systems clean, every finished write in it")


async def _inspect(guest: Guest, filesystem: Filesystem) -> dict[str, Any]:
    """Copy the disk as it was at the snapshot to a raw image and let demo_clean look at that."""
    copy = guest.dir / f"{filesystem.node}-copy.raw"
    await _run("qemu-img", "convert", "-f", filesystem.format, "-O", "raw", str(filesystem.image), str(copy))
    program = [sys.executable, "-m", "tests.lab.demo_clean", filesystem.type, str(copy)]
    result: dict[str, Any] = json.loads(await _run("unshare", "--mount", "--", *program))
    return result


async def _run(*command: str) -> str:
    """Run a program of the host that dies with us, and return what it said. DemoFailed if it fails."""
    process = await asyncio.create_subprocess_exec(
        *("setpriv", "--pdeathsig", "KILL", "--"),
        *command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(CHECK_TIMEOUT_S):
            stdout, stderr = await process.communicate()
    except BaseException:
        process.kill()
        await process.wait()
        raise
    require(process.returncode == 0, f"{' '.join(command)}: {stderr.decode(errors='replace')}")
    return stdout.decode()
