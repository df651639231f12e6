"""What stands on what: the file systems that PID 1 sees, the disks below them, and the files below loop devices.

Looks at PID 1's table of mounts and at sysfs, and opens nothing else: an automount point or a dead network mount is
only a line in that table. Documentation/ABI/stable/sysfs-block, ABI/testing/sysfs-block-loop, -dm and -fs-btrfs.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

from ballast.guest.linux.mountinfo import Mount, find_mount, parse_mountinfo
from ballast.guest.linux.tree import Tree

_DEPTH = 16  # of partitions on dm on md on loop devices; a loop of them ends here all the same


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

    @property
    def has_disk(self) -> bool:
        """Whether it is on a block device. btrfs has an anonymous device number and names its disk as the source."""
        return not self.device.startswith("0:") or self.type == "btrfs"


class Graph:
    """One look at the tables. ``filesystems`` has every superblock by its device, oldest first."""

    def __init__(self, tree: Tree) -> None:
        """OSError, ValueError if PID 1's table cannot be read. Our own may hide mounts, so it is not what counts."""
        self._tree = tree
        self._mounts = parse_mountinfo(tree.read("proc/1/mountinfo"))
        self.filesystems = _by_superblock(self._mounts)

    def holder(self, path: str) -> FileSystem | None:
        """The file system that has ``path``, as PID 1 would resolve it, symbolic links apart."""
        mount = find_mount(self._mounts, path)
        return self.filesystems[mount.device] if mount else None

    def mountpoint(self, mount_id: int) -> str | None:
        """Where PID 1 sees a mount."""
        return next((mount.mountpoint for mount in self._mounts if mount.mount_id == mount_id), None)

    def writes_to(self, path: str, devices: Collection[str]) -> FileSystem | None:
        """Which of the file systems ``devices`` a write to ``path`` ends on first; None if on none of them."""
        holder = self.holder(path)
        return self.nearest(holder, devices) if holder else None

    def nearest(self, filesystem: FileSystem, devices: Collection[str]) -> FileSystem | None:
        """``filesystem`` if it is one of ``devices``, else one of them that holds its data."""
        if filesystem.device in devices:
            return filesystem
        return next(iter(self.below(filesystem, devices)), None)

    def below(self, filesystem: FileSystem, devices: Collection[str]) -> list[FileSystem]:
        """The nearest of ``devices`` that hold ``filesystem``'s data, looking through what is not among them."""
        found: dict[str, FileSystem] = {}
        seen = {filesystem.device}
        left = self._directly_below(filesystem)
        while left:
            one = left.pop()
            if one.device in seen:
                continue
            seen.add(one.device)
            if one.device in devices:
                found[one.device] = one
            else:
                left += self._directly_below(one)
        return [*found.values()]

    def disks(self, filesystem: FileSystem) -> list[str]:
        """Folders in sysfs of its block devices and of all that these are made of."""
        return [*_unique(folder for disk in self._own_disks(filesystem) for folder in self._walk(disk, _DEPTH))]

    def disks_of_device(self, path: str) -> list[str]:
        """As ``disks``, of a block device by its path in /dev."""
        folder = self._folder(path)
        return [*_unique(self._walk(folder, _DEPTH))] if folder else []

    def files_below(self, disks: Iterable[str]) -> list[FileSystem]:
        """The file systems that hold the files of those loop devices that are among ``disks``."""
        files = [file for disk in disks if (file := self._backing_file(disk))]
        return [holder for file in files if (holder := self.holder(file))]

    def _directly_below(self, filesystem: FileSystem) -> list[FileSystem]:
        if filesystem.type == "overlay":
            upper = self._upper(filesystem)
            return [upper] if upper else []
        return self.files_below(self.disks(filesystem))

    def _upper(self, overlay: FileSystem) -> FileSystem | None:
        """Documentation/filesystems/overlayfs.rst: whatever is written goes to the upper directory."""
        mount = next(mount for mount in self._mounts if mount.device == overlay.device)
        upper = mount.super_option("upperdir")
        return self.holder(upper) if upper and upper.startswith("/") else None

    def _own_disks(self, filesystem: FileSystem) -> list[str]:
        if not filesystem.has_disk:
            return []
        if not filesystem.device.startswith("0:"):
            return [f"sys/dev/block/{filesystem.device}"]
        folder = self._folder(filesystem.source)
        if folder is None:
            return []
        name = folder.rpartition("/")[2]
        for uuid in self._tree.names("sys/fs/btrfs"):
            members = self._tree.names(f"sys/fs/btrfs/{uuid}/devices")
            if name in members:
                return [f"sys/class/block/{member}" for member in members]
        return [folder]

    def _folder(self, path: str) -> str | None:
        """The block device at a path in /dev, whose names in /dev/mapper are not the kernel's."""
        name = path.rpartition("/")[2]
        if path.startswith("/dev/mapper/"):
            folders = [f"sys/class/block/{block}" for block in self._tree.names("sys/class/block")]
            return next((folder for folder in folders if self._read(f"{folder}/dm/name") == name), None)
        return f"sys/class/block/{name}" if self._tree.exists(f"sys/class/block/{name}") else None

    def _walk(self, folder: str, depth: int) -> Iterator[str]:
        """A block device, the disk that it is a partition of, and what dm or md make it of; loop over a device too."""
        yield folder
        if depth == 0:
            return
        parents = [f"{folder}/slaves/{name}" for name in self._tree.names(f"{folder}/slaves")]
        if self._tree.exists(f"{folder}/partition"):
            parents.append(f"{folder}/..")
        file = self._backing_file(folder)
        if file and file.startswith("/dev/") and (device := self._folder(file)):
            parents.append(device)
        for parent in parents:
            yield from self._walk(parent, depth - 1)

    def _backing_file(self, folder: str) -> str | None:
        file = self._read(f"{folder}/loop/backing_file")
        return file.removesuffix(" (deleted)") if file else None

    def _read(self, name: str) -> str | None:
        try:
            return self._tree.read(name)
        except OSError:
            return None


def _by_superblock(mounts: list[Mount]) -> dict[str, FileSystem]:
    """Bind mounts and btrfs subvolumes of one file system have the same device number, its superblock's."""
    same: dict[str, list[Mount]] = {}
    for mount in mounts:
        same.setdefault(mount.device, []).append(mount)
    return {
        device: FileSystem(
            device,
            these[0].type,
            these[0].source,
            tuple(_unique(mount.mountpoint for mount in these)),
            is_read_only="ro" in these[0].super_options,
        )
        for device, these in same.items()
    }


def _unique(names: Iterable[str]) -> Iterable[str]:
    return dict.fromkeys(names)
