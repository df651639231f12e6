"""What a freeze would cover: one mount for each superblock, children before the file systems that back them.

Pure over the tables of mounts and a kernel tree; opens nothing. A file system is frozen once whatever the number of
its mounts (bind mounts, btrfs subvolumes), and a loop device's file system before the one that holds its file: frozen
the other way round, the child's writeback would wait for its parent for ever.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from ballast.guest.linux.tree import Tree
from ballast.guest.quiesce.graph import FileSystem as FileSystem
from ballast.guest.quiesce.graph import Graph

# Without a block device of their own, but with somebody's data: said aloud, since a backup lacks them.
_NETWORK = frozenset({"nfs", "nfs4", "cifs", "smb3", "9p", "ceph", "glusterfs", "autofs", "afs", "virtiofs", "fuse"})
_UNFREEZABLE = frozenset({"overlay", "zfs", "tmpfs", "ramfs", "aufs", "ecryptfs"})
# On a block device, but without freeze_fs in their super_operations (fs/ioctl.c, ioctl_fsfreeze; Linux 6.1 to 6.12).
_UNFREEZABLE |= {"vfat", "msdos", "exfat", "ntfs3", "fuseblk", "udf", "hfs", "hfsplus"}
# Where a tmpfs belongs to the running system and nobody misses it in a backup.
_VOLATILE = ("/run", "/dev", "/sys", "/proc")


@dataclass(frozen=True, slots=True)
class Skipped:
    """A file system that a freeze leaves out, and why."""

    filesystem: FileSystem
    reason: str


@dataclass(frozen=True, slots=True)
class Plan:
    """Levels in the order of freezing; the members of one level do not depend on each other."""

    levels: tuple[tuple[FileSystem, ...], ...]
    skipped: tuple[Skipped, ...]

    @property
    def filesystems(self) -> list[FileSystem]:
        """All that would be frozen, in order."""
        return [filesystem for level in self.levels for filesystem in level]


def plan_freeze(tree: Tree, *, only: Collection[str] | None = None, exclude: Iterable[str] = ()) -> Plan:
    """Choose and order file systems from PID 1's table of mounts.

    ``only`` names mount points (all if None; those that are none are the caller's affair); ``exclude`` holds globs.
    OSError, ValueError if the table cannot be read.
    """
    graph = Graph(tree)
    wanted, skipped = [], []
    globs = list(exclude)
    for filesystem in graph.filesystems.values():
        if only is not None and not set(only) & set(filesystem.mountpoints):
            continue
        reason = _why_not(graph, filesystem, globs)
        if reason is None:
            wanted.append(filesystem)
        elif reason:
            skipped.append(Skipped(filesystem, reason))
    return Plan(_in_levels(graph, wanted), tuple(skipped))


def may_not_answer(filesystem: FileSystem) -> bool:
    """Whether opening what is on it waits for a server, an automounter or a process."""
    return filesystem.type in _NETWORK or filesystem.type.startswith("fuse.")


def _why_not(graph: Graph, filesystem: FileSystem, exclude: list[str]) -> str | None:
    """None to freeze it; "" to leave it out without a word; else the reason."""
    if filesystem.type in _UNFREEZABLE or may_not_answer(filesystem):
        volatile = all(
            (point + "/").startswith(tuple(root + "/" for root in _VOLATILE)) for point in filesystem.mountpoints
        )
        return "" if volatile else f"{filesystem.type} cannot be frozen{_but(graph, filesystem)}"
    if not filesystem.has_disk:
        return ""
    if any(fnmatch.fnmatch(point, glob) for point in filesystem.mountpoints for glob in exclude):
        return "excluded"
    return "read-only" if filesystem.is_read_only else None


def _but(graph: Graph, filesystem: FileSystem) -> str:
    """Where an overlay's writes go."""
    below = graph.below(filesystem, graph.filesystems) if filesystem.type == "overlay" else []
    return "".join(f"; what is written to it is on {one.mountpoint}" for one in below)


def _in_levels(graph: Graph, filesystems: list[FileSystem]) -> tuple[tuple[FileSystem, ...], ...]:
    """Put each file system one level before the deepest that backs it."""
    heights = {filesystem.device: 0 for filesystem in filesystems}
    backing = {one.device: {below.device for below in graph.below(one, heights)} for one in filesystems}
    for _ in filesystems:  # a chain is no longer than the list; a cycle cannot be, and ends here all the same
        for device, parents in backing.items():
            heights[device] = max([heights[device], *(heights[parent] + 1 for parent in parents)])
    order = sorted({*heights.values()}, reverse=True)
    return tuple(tuple(f for f in filesystems if heights[f.device] == height) for height in order)
