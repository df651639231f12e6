"""Backups of libvirt's machines, by its own calls alone: ``virDomainBackupBegin`` in pull mode, and checkpoints.

QEMU copies what the guest overwrites into a scratch file before it lets the guest write. libvirt 11.3 has no way to ask
for anything else than that the guest's write fails if the scratch file cannot take it (QEMU's ``on-cbw-error``), so all
its room is taken before: as many bytes as the disk has, for an increment too. The folder has to be on a disk of
this host that is as fast as the guest's own.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

from ballast.host.linux import reserve
from ballast.host.quantity import format_size
from ballast.host.storage import images
from ballast.host.storage.libvirt_domain import Checkpoint, LibvirtDisk, LibvirtDomain
from ballast.host.storage.libvirt_machine import describe_machine
from ballast.host.storage.source import PREFIX, BackupFailed, Disk, Export, NotRepairable
from ballast.host.storage.threads import to_its_end
from ballast.wire.errors import Busy

# In the scratch folder; by this name a job is known for ours.
_SOCKET = "ballast-nbd"
_CUT_S = 10.0
# A qcow2's metadata takes 10 bytes for each cluster of 64 KiB, and what each table leaves of its last cluster.
_METADATA_SHARE = 1 / 4096
_SPARE_BYTES = 2 << 20


class LibvirtSource:
    """A machine by libvirt's "URI/DOMAIN". ``scratch`` is a folder of its own for scratch files and the NBD socket.

    QEMU makes the socket: the folder becomes its user's, and those above must let it pass.
    """

    def __init__(self, target: str, scratch: Path, tpm_state: Path | None = None) -> None:
        self._domain = LibvirtDomain(target)
        self._tpm_state = tpm_state
        self._scratch = scratch
        self._disks: Sequence[LibvirtDisk] = ()
        self._last: str | None = None
        self._new = ""
        self._base: str | None = None
        self._begin_xml: tuple[str, str | None] = ("", None)

    async def survey(self, base: str | None) -> Sequence[Disk]:
        """Look at all disks. BackupFailed if there are none or it is off, DeadlineExceeded."""
        if not await self._domain.is_running():
            raise BackupFailed(f"{self._domain.name} does not run: there is nothing that libvirt could back up live")
        self._disks = await self._domain.disks()
        self._last = base
        if not self._disks:
            raise BackupFailed(f"{self._domain.name} has no disk that could be backed up")
        checkpoints = {one.name: one for one in await self._domain.checkpoints()} if base else {}
        return [_about(disk, base, checkpoints.get(f"{PREFIX}{base}")) for disk in self._disks]

    async def prepare(self, new: str, base: str | None) -> None:
        """Make the scratch files, with all the room they may need. Busy, BackupFailed, OSError."""
        if await self._domain.has_job():
            job = await self._domain.job()
            what = f"a backup at {job.socket or 'a socket of its own'}" if job else "a job"
            raise Busy(f"{self._domain.name}: {what} that is not ours is running; see virsh domjobinfo")
        self._new, self._base = new, base
        owner = await self._domain.owner()
        await to_its_end(_make_folder, self._scratch, owner)
        for disk in self._disks:
            scratch = self._scratch / f"{disk.name}.qcow2"
            await images.create(scratch, disk.bytes)
            try:
                await to_its_end(_reserve, scratch, disk.bytes)
            except OSError as error:
                raise BackupFailed(
                    f"{scratch}: cannot take {format_size(disk.bytes)}, which the guest may overwrite meanwhile: "
                    f"{error.strerror}"
                ) from error
        self._begin_xml = self._backup_xml(), self._checkpoint_xml()

    async def cut(self) -> None:
        """Fix the moment for all disks at once. BackupFailed, DeadlineExceeded."""
        await self._domain.begin(*self._begin_xml, _CUT_S)

    async def exports(self) -> Sequence[Export]:
        """Tell where libvirt serves the disks, which it does since the cut."""
        socket = self._scratch / _SOCKET
        return [
            Export(disk.name, socket, disk.name, f"qemu:dirty-bitmap:{disk.name}" if self._base else None)
            for disk in self._disks
        ]

    async def finish(self, *, keep: bool) -> None:
        """End the job, and let checkpoints tell of changes since the right backup. BackupFailed, NotRepairable."""
        try:
            await self._clean(self._new if keep else self._last)
        finally:
            await self._domain.close()

    async def repair(self, last: str | None) -> Sequence[str]:
        """End a job of ours, and take away all checkpoints of ours but the last. BackupFailed, NotRepairable."""
        try:
            return await self._clean(last)
        finally:
            await self._domain.close()

    async def describe(self, folder: Path) -> None:
        """Write the machine's XML, and what of firmware and TPM is in files. OSError, BackupFailed."""
        await describe_machine(self._domain, folder, self._tpm_state)

    async def _clean(self, last: str | None) -> list[str]:
        said = []
        scratch = self._scratch
        job = await self._domain.job()
        if job and job.socket and job.socket.name == _SOCKET:
            scratch = job.socket.parent
            await self._domain.abort()
            said.append("ended a backup that libvirt still had under way")
        for folder in {scratch, self._scratch}:
            await to_its_end(_remove_folder, folder)
        return said + await self._delete_checkpoints(last)

    async def _delete_checkpoints(self, last: str | None) -> list[str]:
        """Delete all of ours but the last one's.

        What is noted in a later one goes to the last. Where that is lost, the last one goes too: it would not tell all.
        """
        kept = f"{PREFIX}{last}"
        ours = [one for one in await self._domain.checkpoints() if one.name.startswith(PREFIX)]
        others = [one for one in ours if one.name != kept]
        if others and not await self._domain.is_running():
            names = ", ".join(one.name for one in others)
            raise NotRepairable(f"checkpoints can be deleted only while {self._domain.name} runs: {names}")
        is_past_kept, is_lost = False, False
        for one in ours:
            if one.name == kept:
                is_past_kept = True
            else:
                await self._delete(one)
                is_lost |= is_past_kept and not one.is_whole
        said = [f"deleted the checkpoint {one.name}" for one in others]
        if is_lost:
            await self._delete(next(one for one in ours if one.name == kept))
            said.append(f"not all that changed since {last} is known: the next backup will be a full one")
        return said

    async def _delete(self, one: Checkpoint) -> None:
        """Delete it from libvirt's books at least, where its bitmaps are lost. NotRepairable."""
        try:
            await self._domain.delete_checkpoint(one.name)
        except BackupFailed as error:
            if one.is_whole:
                raise NotRepairable(f"checkpoint {one.name} cannot be deleted: {error.desc}") from error
            await self._domain.delete_checkpoint(one.name, metadata_only=True)

    def _backup_xml(self) -> str:
        backup = ElementTree.Element("domainbackup", mode="pull")
        if self._base:
            ElementTree.SubElement(backup, "incremental").text = f"{PREFIX}{self._base}"
        ElementTree.SubElement(backup, "server", transport="unix", socket=str(self._scratch / _SOCKET))
        disks = ElementTree.SubElement(backup, "disks")
        for one in self._disks:
            disk = ElementTree.SubElement(disks, "disk", name=one.name, type="file", exportname=one.name)
            if self._base:
                disk.set("exportbitmap", one.name)
            ElementTree.SubElement(disk, "driver", type="qcow2")
            ElementTree.SubElement(disk, "scratch", file=str(self._scratch / f"{one.name}.qcow2"))
        return ElementTree.tostring(backup, encoding="unicode")

    def _checkpoint_xml(self) -> str | None:
        """None where some disk cannot take part: every backup is a full one then."""
        if not all(disk.keeps_bitmaps for disk in self._disks):
            return None
        checkpoint = ElementTree.Element("domaincheckpoint")
        ElementTree.SubElement(checkpoint, "name").text = f"{PREFIX}{self._new}"
        disks = ElementTree.SubElement(checkpoint, "disks")
        for one in self._disks:
            ElementTree.SubElement(disks, "disk", name=one.name, checkpoint="bitmap")
        return ElementTree.tostring(checkpoint, encoding="unicode")


def _about(disk: LibvirtDisk, base: str | None, checkpoint: Checkpoint | None) -> Disk:
    reason = _why_full(disk, base, checkpoint) if base else None
    changed_bytes = checkpoint.changed_bytes[disk.name] if checkpoint and not reason else None
    return Disk(disk.name, disk.bytes, disk.used_bytes, changed_bytes, reason)


def _why_full(disk: LibvirtDisk, base: str, checkpoint: Checkpoint | None) -> str | None:
    if not disk.keeps_bitmaps:
        return f"{disk.name} is a {disk.format} image, and libvirt can note changes only in qcow2"
    if checkpoint is None:
        return f"libvirt has no checkpoint {PREFIX}{base}"
    if disk.name not in checkpoint.changed_bytes:
        return f"{disk.name} has no part in the checkpoint {PREFIX}{base}: it was added later"
    if checkpoint.changed_bytes[disk.name] is None:
        return f"what {disk.name} notes of changes since {base} is not whole: QEMU did not end in order"
    return None


def _make_folder(folder: Path, owner: tuple[int, int] | None) -> None:
    if not folder.parent.exists():
        folder.parent.mkdir(parents=True)
        folder.parent.chmod(0o711)
    _remove_folder(folder)
    folder.mkdir(mode=0o700)
    if owner:
        os.chown(folder, *owner)


def _reserve(scratch: Path, bytes_: int) -> None:
    with scratch.open("rb+") as file:
        os.fchmod(file.fileno(), 0o600)
        reserve(file.fileno(), round(bytes_ * (1 + _METADATA_SHARE)) + _SPARE_BYTES)


def _remove_folder(folder: Path) -> None:
    """Remove what we put there, and nothing that is not ours."""
    if folder.is_dir() and not folder.is_symlink():
        for path in folder.iterdir():
            if path.suffix == ".qcow2" or path.name == _SOCKET:
                path.unlink()
        folder.rmdir()
