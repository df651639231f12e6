"""What may go wrong in a freeze although every file system can be frozen: each risk with its culprit by name.

Reads /proc, /sys and two small files of daemons; opens nothing on any other file system, and none on what a server or
an automounter must answer for. What cannot be looked at is told as a risk too: "cannot tell" is no "no". What only
others can tell is in ``culprits``.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

from ballast.guest.bus import BusError
from ballast.guest.linux.mountinfo import parse_mountinfo, unescape
from ballast.guest.linux.tree import Tree
from ballast.guest.quiesce.forecast import FileSystem, Plan, may_not_answer
from ballast.guest.quiesce.graph import Graph
from ballast.guest.threads import in_thread
from ballast.wire.names import Risk, RiskKind

Look = Callable[["Freeze"], Awaitable[list[str]]]

# systemd-journald.service: WatchdogSec=3min. A journald that waits for its disk is killed for it.
_JOURNALD_WATCHDOG_S = 180
_OURS = "/run/ballast"
_PROCESS = re.compile(r"\d+")


@dataclass(frozen=True, slots=True)
class Freeze:
    """A freeze that may come: in which system, of what, for how long at most.

    ``max_age_s``: how old may be what others have told, whom to ask takes time.
    """

    tree: Tree
    graph: Graph
    plan: Plan
    lease_s: float
    max_age_s: float = 0.0

    @property
    def devices(self) -> set[str]:
        """Of all file systems that would be frozen."""
        return {filesystem.device for filesystem in self.plan.filesystems}

    def stops(self, path: str) -> FileSystem | None:
        """The file system for which a write to ``path`` would wait."""
        return self.graph.writes_to(path, self.devices)


async def find_risks(freeze: Freeze, looks: Mapping[RiskKind, Look], *, timeout_s: float) -> list[Risk]:
    """What ``looks`` find, one entry for each culprit. All look at once, and for no longer than ``timeout_s``."""

    async def find(kind: RiskKind) -> list[Risk]:
        try:
            async with asyncio.timeout(timeout_s):
                return [Risk(kind, detail) for detail in await looks[kind](freeze)]
        except TimeoutError:
            return [Risk(kind, f"cannot tell: no answer within {timeout_s:g} s")]
        except (OSError, ValueError, BusError) as error:
            return [Risk(kind, f"cannot tell: {error}")]

    return [risk for risks in await asyncio.gather(*map(find, looks)) for risk in risks]


async def _read(check: Callable[[Freeze], Iterator[str]], freeze: Freeze) -> list[str]:
    """In a thread: a daemon's file can be on a disk that does not answer."""
    try:
        return await in_thread(lambda: [*check(freeze)], name="quiesce-look")
    except FileNotFoundError:  # the kernel or the system has no such thing
        return []


def _hung_task_panic(freeze: Freeze) -> Iterator[str]:
    """Documentation/admin-guide/sysctl/kernel.rst: a task that waits uninterruptibly for so long, as a writer does."""
    timeout_s = int(freeze.tree.read("proc/sys/kernel/hung_task_timeout_secs"))
    if int(freeze.tree.read("proc/sys/kernel/hung_task_panic")) and 0 < timeout_s <= freeze.lease_s:
        yield f"the kernel panics when a task waits for {timeout_s} s (kernel.hung_task_panic)"


def _watchdog(freeze: Freeze) -> Iterator[str]:
    """Documentation/ABI/testing/sysfs-class-watchdog. Who feeds it may wait for a frozen file system."""
    for name in freeze.tree.names("sys/class/watchdog"):
        state, timeout_s, identity = (
            freeze.tree.read(f"sys/class/watchdog/{name}/{file}") for file in ("state", "timeout", "identity")
        )
        if state == "active" and int(timeout_s) <= freeze.lease_s:
            yield f"{name} ({identity}) resets the guest when nobody has fed it for {timeout_s} s"


def _nfs_export(freeze: Freeze) -> Iterator[str]:
    """exportfs(8): /var/lib/nfs/etab has what is exported, as long as nfsd has threads."""
    if not int(freeze.tree.read("proc/fs/nfsd/threads")):
        return
    for line in _read_local(freeze, "/var/lib/nfs/etab").splitlines():
        path = line.split("\t")[0]
        if freeze.stops(path):
            yield f"clients of the export {path} wait"


def _hidden_disk(freeze: Freeze) -> Iterator[str]:
    """File systems on disks that only another mount namespace has: no freeze of PID 1's mounts covers them."""
    tables = {freeze.tree.read("proc/1/mountinfo")}
    known = {*freeze.graph.filesystems}
    for pid in _user_pids(freeze.tree):
        try:
            table = freeze.tree.read(f"proc/{pid}/mountinfo")
            if table in tables:
                continue
            name = freeze.tree.read(f"proc/{pid}/comm")
        except OSError:  # it has ended, or has no mounts any more
            continue
        tables.add(table)
        for line in filter(None, table.split("\n")):
            device = "".join(line.split(" ", 3)[2:3])
            if device in known or device.startswith("0:"):
                continue  # most are: a service of its own namespace has the system's mounts all over again
            for mount in parse_mountinfo(line):
                known.add(mount.device)
                yield f"{mount.source} ({mount.type}) is mounted for {name} ({pid}) alone, at {mount.mountpoint}"


def _logger(freeze: Freeze) -> Iterator[str]:
    """Daemons that write to disk whatever happens, and what the system does when they cannot."""
    long_enough = freeze.lease_s > _JOURNALD_WATCHDOG_S
    if long_enough and freeze.stops("/var/log/journal") and freeze.tree.exists("var/log/journal"):
        yield f"systemd kills a systemd-journald that waits for {_JOURNALD_WATCHDOG_S} s, and lines are lost"
    if freeze.stops("/var/log/audit") and freeze.tree.exists("var/log/audit"):
        for pid in _user_pids(freeze.tree):
            with contextlib.suppress(OSError):  # it has ended
                if freeze.tree.read(f"proc/{pid}/comm") == "auditd":
                    yield f"when the backlog of auditd ({pid}) is full, every audited process waits"


def _swap_file(freeze: Freeze) -> Iterator[str]:
    """proc_swaps(5). The kernel swaps past the file system to a file's blocks, but a loop device must write to one."""
    for line in freeze.tree.read("proc/swaps").splitlines()[1:]:
        name, kind = line.split()[:2]
        name = unescape(name).removesuffix(" (deleted)")
        holder = freeze.graph.holder(name) if kind == "file" else None
        disks = freeze.graph.disks(holder) if holder else freeze.graph.disks_of_device(name)
        for below in freeze.graph.files_below(disks):
            if stops := freeze.graph.nearest(below, freeze.devices):
                yield f"swapping to {name} waits for {stops.mountpoint}, and with it whoever needs memory"
        if holder and holder.device in freeze.devices:
            yield f"{name} is swapped to while {holder.mountpoint} is frozen, so its disk is not still"


def _own_file(freeze: Freeze) -> Iterator[str]:
    """The agent writes to its place in /run only, also while everything is frozen."""
    if stops := freeze.stops(_OURS):
        yield f"Ballast's own {_OURS} is on {stops.mountpoint}, and not on a tmpfs"


def _user_pids(tree: Tree) -> Iterator[str]:
    """All processes but the kernel's threads, which are most of them: kthreadd's children, by proc_pid_task(5)."""
    try:
        threads = {*tree.read("proc/2/task/2/children").split()}
    except OSError:  # in a container, or a kernel without CONFIG_PROC_CHILDREN
        threads = set()
    return (name for name in tree.names("proc") if _PROCESS.fullmatch(name) and name not in threads)


def _read_local(freeze: Freeze, path: str) -> str:
    holder = freeze.graph.holder(path)
    if holder and may_not_answer(holder):
        raise ValueError(f"{path} is on {holder.type}, which may not answer")
    return freeze.tree.read(path)


READERS: dict[RiskKind, Look] = {
    "hung-task-panic": partial(_read, _hung_task_panic),
    "watchdog": partial(_read, _watchdog),
    "nfs-export": partial(_read, _nfs_export),
    "hidden-disk": partial(_read, _hidden_disk),
    "logger": partial(_read, _logger),
    "swap-file": partial(_read, _swap_file),
    "own-file": partial(_read, _own_file),
}
