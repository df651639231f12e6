"""Risks that ``witnesses`` tell of, with their culprits."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial

from ballast.guest.linux.fanotify import Mark
from ballast.guest.quiesce.risks import Freeze, Look
from ballast.guest.quiesce.witnesses import Witnesses
from ballast.wire.names import RiskKind

_TIMER_STAMPS = "/var/lib/systemd/timers"  # systemd.timer(5), Persistent=
_NAMED = 3  # mount points, before the rest is only counted


def ask_others(witnesses: Witnesses) -> dict[RiskKind, Look]:
    """What to ask. Not while anything of ours is frozen: PID 1 has to answer."""
    return {
        "fanotify": partial(_fanotify_holders, witnesses),
        "timer": partial(_due_timers, witnesses),
        "multipath": partial(_queueing_maps, witnesses),
    }


async def _fanotify_holders(witnesses: Witnesses, freeze: Freeze) -> list[str]:
    """Who opens what is marked waits for the holder, which waits in turn if it writes to what is frozen."""
    marks: dict[int, list[Mark]] = {}
    for mark in await witnesses.permission_marks.get(freeze.max_age_s):
        marks.setdefault(mark.pid, []).append(mark)
    return [
        f"{_name(freeze, pid)} ({pid}) has to permit whatever is opened on {_places(freeze, its)}; if it waits for "
        f"a frozen disk, so does everybody"
        for pid, its in marks.items()
    ]


async def _queueing_maps(witnesses: Witnesses, freeze: Freeze) -> list[str]:
    """With queue_if_no_path no write fails when the last path does, so that none ends: nor freeze, nor thaw."""
    users: dict[str, list[str]] = {}
    for filesystem in freeze.plan.filesystems:
        for disk in freeze.graph.disks(filesystem):
            if name := _multipath_name(freeze, disk):
                users.setdefault(name, []).append(filesystem.mountpoint)
    if not users:
        return []
    queues = await witnesses.queueing_maps.get(freeze.max_age_s)
    if unknown := sorted(users.keys() - queues):
        raise ValueError(f"device-mapper does not tell of {', '.join(unknown)}")
    return [
        f"{name} queues for ever when its last path fails (queue_if_no_path), and with it {', '.join(points)}"
        for name, points in users.items()
        if queues[name]
    ]


async def _due_timers(witnesses: Witnesses, freeze: Freeze) -> list[str]:
    """systemd writes down when it started a persistent timer's unit: PID 1 waits for the disk, and so does all else."""
    stops = freeze.stops(_TIMER_STAMPS)
    if stops is None:
        return []
    now_s = time.time()
    timers = await witnesses.timers.get(freeze.max_age_s)
    if any(due_s <= now_s for due_s in timers.values()):  # since they were asked for: it is due at another time now
        timers = await witnesses.timers.get(0.0)
    left_s = {name: due_s - now_s for name, due_s in timers.items()}
    return [
        f"{name} is due {f'in {left:.0f} s' if left >= 1 else 'now'}: systemd writes its stamp to {stops.mountpoint}, "
        f"and starts nothing more until the thaw"
        for name, left in left_s.items()
        if left <= freeze.lease_s
    ]


def _name(freeze: Freeze, pid: int) -> str:
    try:
        return freeze.tree.read(f"proc/{pid}/comm")
    except OSError:  # it has ended
        return "a process"


def _places(freeze: Freeze, marks: Sequence[Mark]) -> str:
    """Mount points of what is marked; a mount that PID 1 does not have is one of a container's."""
    points: dict[str, None] = {}
    for mark in marks:
        filesystem = freeze.graph.filesystems.get(mark.device) if mark.device else None
        point = freeze.graph.mountpoint(mark.mount_id) if mark.mount_id is not None else None
        points[point or (filesystem.mountpoint if filesystem else "a mount of its own")] = None
    more = f" and {len(points) - _NAMED} more" if len(points) > _NAMED else ""
    return ", ".join([*points][:_NAMED]) + more


def _multipath_name(freeze: Freeze, disk: str) -> str | None:
    """Documentation/ABI/testing/sysfs-block-dm; multipath-tools begins a map's UUID so."""
    try:
        is_multipath = freeze.tree.read(f"{disk}/dm/uuid").startswith("mpath-")
        return freeze.tree.read(f"{disk}/dm/name") if is_multipath else None
    except OSError:  # no device of device-mapper's
        return None
