"""What may go wrong in a freeze although every file system can be frozen: each risk with its culprit by name.

Reads /proc, /sys and two small files of daemons; opens nothing on any other file system. What cannot be looked at is
told as a risk too: "cannot tell" is no "no".
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from ballast.guest.linux.mountinfo import parse_mountinfo
from ballast.guest.linux.tree import Tree
from ballast.guest.quiesce.forecast import Plan, holder_of
from ballast.wire.names import QuiesceForecast, Risk, RiskKind, Skipped

# systemd-journald.service: WatchdogSec=3min. A journald that waits for its disk is killed for it.
_JOURNALD_WATCHDOG_S = 180
_DIRTY = re.compile(r"^(?:Dirty|Writeback): +(\d+) kB$", re.MULTILINE)
_PROCESS = re.compile(r"\d+")


def foretell(tree: Tree, plan: Plan, lease_s: float) -> QuiesceForecast:
    """All that can be known of a freeze of at most ``lease_s``. Blocks for milliseconds. OSError, ValueError."""
    dirty_bytes = sum(1024 * int(kib) for kib in _DIRTY.findall(tree.read("proc/meminfo")))
    return QuiesceForecast(
        [[filesystem.mountpoint for filesystem in level] for level in plan.levels],
        [Skipped(one.filesystem.mountpoint, one.reason) for one in plan.skipped],
        find_risks(tree, plan, lease_s),
        dirty_bytes,
    )


def find_risks(tree: Tree, plan: Plan, lease_s: float) -> list[Risk]:
    """Every risk of a freeze, one entry for each culprit."""
    found = []
    for kind, check in _CHECKS.items():
        try:
            found += [Risk(kind, detail) for detail in check(tree, plan, lease_s)]
        except FileNotFoundError:  # the kernel or the system has no such thing
            continue
        except (OSError, ValueError) as error:
            found.append(Risk(kind, f"cannot tell: {error}"))
    return found


def _hung_task_panic(tree: Tree, _: Plan, lease_s: float) -> Iterator[str]:
    """Documentation/admin-guide/sysctl/kernel.rst: a task that waits uninterruptibly for so long, as a writer does."""
    timeout_s = int(tree.read("proc/sys/kernel/hung_task_timeout_secs"))
    if int(tree.read("proc/sys/kernel/hung_task_panic")) and 0 < timeout_s <= lease_s:
        yield f"the kernel panics when a task waits for {timeout_s} s (kernel.hung_task_panic)"


def _watchdog(tree: Tree, _: Plan, lease_s: float) -> Iterator[str]:
    """Documentation/ABI/testing/sysfs-class-watchdog. Who feeds it may wait for a frozen file system."""
    for name in tree.names("sys/class/watchdog"):
        state, timeout_s, identity = (
            tree.read(f"sys/class/watchdog/{name}/{file}") for file in ("state", "timeout", "identity")
        )
        if state == "active" and int(timeout_s) <= lease_s:
            yield f"{name} ({identity}) resets the guest when nobody has fed it for {timeout_s} s"


def _nfs_export(tree: Tree, plan: Plan, _: float) -> Iterator[str]:
    """exportfs(8): /var/lib/nfs/etab has what is exported, as long as nfsd has threads."""
    if not int(tree.read("proc/fs/nfsd/threads")):
        return
    for line in tree.read("var/lib/nfs/etab").splitlines():
        path = line.split("\t")[0]
        if holder_of(path, plan.filesystems):
            yield f"clients of the export {path} wait"


def _hidden_disk(tree: Tree, _plan: Plan, _: float) -> Iterator[str]:
    """File systems on disks that only another mount namespace has: no freeze of PID 1's mounts covers them."""
    tables = {tree.read("proc/1/mountinfo")}
    known = {mount.device for table in tables for mount in parse_mountinfo(table)}
    for pid in filter(_PROCESS.fullmatch, tree.names("proc")):
        try:
            table, name = tree.read(f"proc/{pid}/mountinfo"), tree.read(f"proc/{pid}/comm")
        except OSError:  # it has ended, or has no mounts any more
            continue
        if table in tables:
            continue
        tables.add(table)
        for mount in parse_mountinfo(table):
            if mount.device not in known and not mount.device.startswith("0:"):
                known.add(mount.device)
                yield f"{mount.source} ({mount.type}) is mounted for {name} ({pid}) alone, at {mount.mountpoint}"


def _logger(tree: Tree, plan: Plan, lease_s: float) -> Iterator[str]:
    """Daemons that write to disk whatever happens, and what the system does when they cannot."""
    journal = holder_of("/var/log/journal", plan.filesystems) if tree.exists("var/log/journal") else None
    if journal and lease_s > _JOURNALD_WATCHDOG_S:
        yield f"systemd kills a systemd-journald that waits for {_JOURNALD_WATCHDOG_S} s, and lines are lost"
    if not holder_of("/var/log/audit", plan.filesystems):
        return
    for pid in filter(_PROCESS.fullmatch, tree.names("proc")):
        try:
            name = tree.read(f"proc/{pid}/comm")
        except OSError:
            continue
        if name == "auditd":
            yield f"when the backlog of auditd ({pid}) is full, every audited process waits"


_CHECKS: dict[RiskKind, Callable[[Tree, Plan, float], Iterator[str]]] = {
    "hung-task-panic": _hung_task_panic,
    "watchdog": _watchdog,
    "nfs-export": _nfs_export,
    "hidden-disk": _hidden_disk,
    "logger": _logger,
}
