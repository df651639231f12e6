"""Backups of a QEMU that somebody started with a QMP socket. For one of libvirt's, see ``libvirt_source``.

QEMU has its QMP for one client at a time: it is held from the beginning to the cut, and left to others while the
backup is copied.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path

from ballast.host.qmp import Qmp
from ballast.host.storage import qemu_bitmaps, qemu_nodes
from ballast.host.storage.images import create
from ballast.host.storage.qemu_disks import QemuDisk, read_disks
from ballast.host.storage.qemu_machine import describe_machine
from ballast.host.storage.shape import shape_of_qemu, write_shape
from ballast.host.storage.source import BackupFailed, Disk, Export
from ballast.host.storage.threads import to_its_end
from ballast.wire.errors import Busy

# Of QEMU's migration, when nothing is under way (qapi/migration.json, MigrationStatus).
_AT_REST = (None, "none", "completed", "failed", "cancelled")


class QemuSource:
    """A QEMU by its QMP socket, PATH or ``unix:PATH``.

    ``fleece`` is a folder for the blocks that the guest overwrites meanwhile, on a disk that is fast enough for the
    guest: if one cannot be kept there within ``timeout_s``, the backup is given up.
    """

    def __init__(self, qmp: str, fleece: Path, timeout_s: int) -> None:
        self._path = qmp
        self._fleece = fleece
        self._timeout_s = timeout_s
        self._connection = AsyncExitStack()
        self._qmp: Qmp | None = None
        self._disks: Sequence[QemuDisk] = ()
        self._last: str | None = None
        self._new = ""
        self._base: str | None = None

    async def survey(self, base: str | None) -> Sequence[Disk]:
        """Look at all disks. PeerGone, NoAnswer, QmpFailed, BackupFailed if there are none."""
        self._disks = await read_disks(await self._connected())
        self._last = base
        if not self._disks:
            raise BackupFailed("the machine has no disk that could be backed up")
        return [_about(disk, base) for disk in self._disks]

    async def prepare(self, new: str, base: str | None) -> None:
        """Seat the devices and begin to note what changes. Busy while the machine migrates, QmpFailed, OSError."""
        qmp = await self._connected()
        status = (await qmp.run("query-migrate")).get("status")
        if status not in _AT_REST:
            raise Busy(f"the machine is migrating or is saved ({status})")
        self._new, self._base = new, base
        await to_its_end(_make_folder, self._fleece, qmp.pid)
        for number, disk in enumerate(self._disks):
            old_blocks = self._fleece / f"{number}.qcow2"
            await create(old_blocks, disk.bytes)
            await to_its_end(_give, old_blocks, qmp.pid)
            await qemu_nodes.put_in(qmp, number, disk, old_blocks, self._timeout_s)
        await qemu_bitmaps.note(qmp, self._disks, new)

    async def cut(self) -> None:
        """Fix the moment for all disks at once. QmpFailed."""
        await qemu_nodes.cut(await self._connected(), len(self._disks))

    async def exports(self) -> Sequence[Export]:
        """Serve the disks as they were, and leave QMP to others. Busy, QmpFailed."""
        qmp = await self._connected()
        bitmap = None
        if self._base:
            await qemu_bitmaps.close(qmp, self._disks, self._base)
            bitmap = qemu_bitmaps.bitmap_of(self._base)
        exports = await qemu_nodes.export(qmp, self._disks, self._fleece / "nbd", bitmap)
        await self._disconnect()
        return exports

    async def finish(self, *, keep: bool) -> None:
        """Take everything of ours out of QEMU. PeerGone if it is gone, QmpFailed, NotRepairable."""
        try:
            await self._clean(self._new if keep else self._last)
        finally:
            await self._disconnect()

    async def repair(self, last: str | None) -> Sequence[str]:
        """Take out what was left, and set the notes right. PeerGone, QmpFailed, NotRepairable."""
        try:
            nodes, bitmaps = await self._clean(last)
        finally:
            await self._disconnect()
        said = []
        if nodes:
            said.append(f"took {nodes} block nodes out of QEMU")
        if bitmaps:
            kept = f"those since {last} are whole" if last else "there is no backup to keep them for"
            said.append(f"removed {bitmaps} notes of changes (bitmaps); {kept}")
        return said

    async def describe(self, folder: Path) -> None:
        """Write QEMU's command line and what it says of the machine. OSError, QmpFailed."""
        qmp = await self._connected()
        about, firmware = await describe_machine(qmp)
        shape = await shape_of_qemu(qmp, self._disks, about["working-directory"])
        await to_its_end(_write_machine, folder, about, firmware)
        await to_its_end(write_shape, folder, shape)

    async def _clean(self, last: str | None) -> tuple[int, int]:
        qmp = await self._connected()
        nodes = await qemu_nodes.take_out(qmp)
        await to_its_end(_remove_folder, self._fleece)
        return nodes, await qemu_bitmaps.settle(qmp, await read_disks(qmp), last)

    async def _connected(self) -> Qmp:
        if self._qmp is None:
            self._qmp = await self._connection.enter_async_context(Qmp.connect(self._path))
        return self._qmp

    async def _disconnect(self) -> None:
        self._qmp = None
        await self._connection.aclose()


def _about(disk: QemuDisk, base: str | None) -> Disk:
    reason = qemu_bitmaps.why_full(disk, base) if base else None
    bitmap = disk.bitmaps[qemu_bitmaps.bitmap_of(base)] if base and not reason else None
    return Disk(disk.name, disk.bytes, disk.used_bytes, bitmap.changed_bytes if bitmap else None, reason)


def _make_folder(folder: Path, pid: int) -> None:
    """Make the folder anew, QEMU's own: it opens the images and makes the socket in there as its own user."""
    folder.parent.mkdir(mode=0o711, parents=True, exist_ok=True)
    _remove_folder(folder)
    folder.mkdir(mode=0o700)
    _give(folder, pid)


def _give(path: Path, pid: int) -> None:
    about = Path("/proc", str(pid)).stat()
    os.chown(path, about.st_uid, about.st_gid, follow_symlinks=False)


def _remove_folder(folder: Path) -> None:
    """Remove what we put there, and nothing that is not ours."""
    if folder.is_dir() and not folder.is_symlink():
        for path in folder.iterdir():
            if path.suffix == ".qcow2" or path.name == "nbd":
                path.unlink()
        folder.rmdir()


def _write_machine(folder: Path, about: object, firmware: Sequence[Path]) -> None:
    (folder / "machine.json").write_text(json.dumps(about, indent=2) + "\n")
    for number, path in enumerate(firmware):
        (folder / f"firmware-{number}").write_bytes(path.read_bytes())
