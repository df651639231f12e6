"""What a freeze would cover: one mount for each superblock, children before the file systems that back them.

Pure over the tables of mounts and a kernel tree; opens nothing. A file system is frozen once whatever the number of
its mounts (bind mounts, btrfs subvolumes), and a loop device's file system before the one that holds its file: frozen
the other way round, the child's writeback would wait for its parent for ever.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from ballast.guest.linux.mountinfo import Mount, parse_mountinfo
from ballast.guest.linux.tree import Tree

# Types without a block device of their own that still hold somebody's data: said aloud, since a backup lacks them.
_NETWORK = frozenset({"nfs", "nfs4", "cifs", "smb3", "9p", "ceph", "glusterfs", "autofs", "afs", "virtiofs", "fuse"})
_UNFREEZABLE = frozenset({"overlay", "zfs", "tmpfs", "ramfs", "aufs", "ecryptfs"}) | _NETWORK
# Where a tmpfs belongs to the running system and nobody misses it in a backup.
_VOLATILE = ("/run", "/dev", "/sys", "/proc")


@dataclass(frozen=True, slots=True)
class FileSystem:
    """A superblock: "major:minor", all its mount points (oldest first), and what it is."""

    device: str
    type: str
    source: str
    mountpoints: tuple[str, ...]
    is_read_only: bool = False

    @property
    def mountpoint(self) -> str:
        """The name that reports call it by."""
        return self.mountpoints[0]


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
    wanted, skipped = [], []
    globs = list(exclude)
    for filesystem in read_filesystems(tree):
        if only is not None and not set(only) & set(filesystem.mountpoints):
            continue
        reason = _why_not(filesystem, globs)
        if reason is None:
            wanted.append(filesystem)
        elif reason:
            skipped.append(Skipped(filesystem, reason))
    return Plan(_in_levels(tree, wanted), tuple(skipped))


def read_filesystems(tree: Tree) -> list[FileSystem]:
    """Every superblock in PID 1's mount namespace. Our own may hide some, so it is not what counts."""
    mounts: dict[str, list[Mount]] = {}
    for mount in parse_mountinfo(tree.read("proc/1/mountinfo")):
        mounts.setdefault(mount.device, []).append(mount)
    return [
        FileSystem(
            device,
            same[0].type,
            same[0].source,
            tuple(dict.fromkeys(mount.mountpoint for mount in same)),
            is_read_only="ro" in same[0].super_options,
        )
        for device, same in mounts.items()
    ]


def _why_not(filesystem: FileSystem, exclude: list[str]) -> str | None:
    """None to freeze it; "" to leave it out without a word; else the reason."""
    if filesystem.type in _UNFREEZABLE or filesystem.type.startswith("fuse."):
        volatile = all(
            (point + "/").startswith(tuple(root + "/" for root in _VOLATILE)) for point in filesystem.mountpoints
        )
        return "" if volatile else f"{filesystem.type} cannot be frozen"
    if not _has_storage(filesystem):
        return ""
    if any(fnmatch.fnmatch(point, glob) for point in filesystem.mountpoints for glob in exclude):
        return "excluded"
    return "read-only" if filesystem.is_read_only else None


def _has_storage(filesystem: FileSystem) -> bool:
    """Whether it is on a block device. btrfs has an anonymous device number and names its disk as the source."""
    return not filesystem.device.startswith("0:") or filesystem.type == "btrfs"


def _in_levels(tree: Tree, filesystems: list[FileSystem]) -> tuple[tuple[FileSystem, ...], ...]:
    """Put each file system one level before the deepest that backs it."""
    heights = {filesystem.device: 0 for filesystem in filesystems}
    backing = {filesystem.device: _backing(tree, filesystem, filesystems) for filesystem in filesystems}
    for _ in filesystems:  # a chain is no longer than the list; a cycle cannot be, and ends here all the same
        for device, parents in backing.items():
            heights[device] = max([heights[device], *(heights[parent] + 1 for parent in parents if parent != device)])
    order = sorted({*heights.values()}, reverse=True)
    return tuple(tuple(f for f in filesystems if heights[f.device] == height) for height in order)


def _backing(tree: Tree, filesystem: FileSystem, filesystems: list[FileSystem]) -> set[str]:
    """Devices of the file systems that hold the files of this one's loop devices, through dm and md."""
    device = _block_device(tree, filesystem)
    found = set()
    for file in _backing_files(tree, f"sys/dev/block/{device}", depth=8) if device else ():
        holder = holder_of(file, filesystems)
        if holder:
            found.add(holder)
    return found


def _block_device(tree: Tree, filesystem: FileSystem) -> str | None:
    if not filesystem.device.startswith("0:"):
        return filesystem.device
    name = filesystem.source.rpartition("/")[2]
    if filesystem.source.startswith("/dev/mapper/"):
        mapped = [dm for dm in tree.names("sys/class/block") if _mapper_name(tree, dm) == name]
        name = mapped[0] if mapped else name
    try:
        return tree.read(f"sys/class/block/{name}/dev")
    except OSError:
        return None


def _mapper_name(tree: Tree, block_device: str) -> str | None:
    try:
        return tree.read(f"sys/class/block/{block_device}/dm/name")
    except OSError:
        return None


def _backing_files(tree: Tree, device: str, *, depth: int) -> list[str]:
    """Loop backing files below a block device: its own, and those of its dm and md slaves."""
    try:
        return [tree.read(f"{device}/loop/backing_file").removesuffix(" (deleted)")]
    except OSError:
        pass
    if depth == 0:
        return []
    parents = [f"{device}/slaves/{name}" for name in tree.names(f"{device}/slaves")]
    if tree.exists(f"{device}/partition"):
        parents.append(f"{device}/..")
    return [file for parent in parents for file in _backing_files(tree, parent, depth=depth - 1)]


def holder_of(file: str, filesystems: list[FileSystem]) -> str | None:
    """The device of the file system whose mount point is the longest prefix of ``file``."""
    points = [
        (len(point.rstrip("/")), filesystem.device)
        for filesystem in filesystems
        for point in filesystem.mountpoints
        if (file + "/").startswith(point.rstrip("/") + "/")
    ]
    return max(points)[1] if points else None
