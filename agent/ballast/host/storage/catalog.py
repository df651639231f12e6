"""The backups of a virtual machine, as folders: ``TARGET/VM/ID``, before that ``ID.partial``, after it ``ID.removing``.

A backup is there when its folder has its name. What it is made of is on the disk before it gets the name, and it loses
the name before anything of it goes. So whoever is killed, or loses power, leaves a whole backup or none.

All of it waits for the target's file system, which may be slow or dead: call it from a thread. OSError is the target's.
Whoever changes anything holds the lock; to read takes none.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import os
import re
import secrets
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.parse import quote

from ballast.host import linux
from ballast.host.storage.folders import make_folder, sync, sync_all, take_away
from ballast.host.storage.record import Backup, Damaged, Image, read_backup, write_backup
from ballast.wire.errors import AgentError, BadRequest, Busy, NoSuchId

__all__ = ["Backup", "Catalog", "Damaged", "Image", "StillNeeded"]

_PARTIAL, _REMOVING, _REPLACED = ".partial", ".removing", ".replaced"
_UNREADY = (_PARTIAL, _REMOVING, _REPLACED)
_LOCK = "lock"
_STAMP = "%Y%m%dT%H%M%SZ"
_STAMP_LENGTH = len("20261123T181500Z")
_ID = re.compile(r"\d{8}T\d{6}Z-[0-9a-f]{6}")
_NAME_LIMIT_BYTES = 255


class StillNeeded(AgentError):
    """A backup cannot go, since another one is based on it; the text names that."""


class Catalog:
    """All backups of one machine. ``folder`` need not exist before the first."""

    def __init__(self, target: Path, vm: str) -> None:
        """BadRequest for a name that no folder can have; touches no file."""
        self.vm = vm
        self.folder = target / _folder_name(vm)

    def new_id(self, now: datetime) -> str:
        """An id that sorts behind all others, also when the clock was put back: it then tells a later second."""
        second = now.astimezone(UTC).replace(microsecond=0)
        stamps = [name[:_STAMP_LENGTH] for name in self._names() if _ID.match(name)]
        if stamps:
            last = datetime.strptime(max(stamps), _STAMP).replace(tzinfo=UTC)
            second = max(second, last + timedelta(seconds=1))
        return f"{second.strftime(_STAMP)}-{secrets.token_hex(3)}"

    def begin(self, id_: str) -> Path:
        """Make the folder in which a backup is made, or made anew; nobody else can look into it."""
        make_folder(self.folder)
        partial = self._path(id_, _PARTIAL)
        partial.mkdir(mode=0o700)
        return partial

    def commit(self, backup: Backup, images: Sequence[Image]) -> Backup:
        """Put a backup into the catalogue, whole and on the disk; return it with its images. Damaged, OSError.

        After an error it is not in the catalogue, and what was made of it is where it was.
        """
        partial, place = self._path(backup.id, _PARTIAL), self._path(backup.id)
        made = _settle(partial, backup, images)
        partial.rename(place)
        try:
            sync(self.folder)
        except OSError:
            place.rename(partial)
            raise
        return made

    def replace(self, backup: Backup, images: Sequence[Image]) -> Backup:
        """As ``commit``, for a backup of that id that was made anew: it takes the old one's place.

        At once, where the file system can exchange two folders. On others (NFS, SMB) whoever is killed may leave the
        old one aside, for ``sweep`` to put it back.
        """
        partial, place = self._path(backup.id, _PARTIAL), self._path(backup.id)
        made = _settle(partial, backup, images)
        try:
            linux.exchange(partial, place)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self._replace_in_steps(backup.id)
            return made
        try:
            sync(self.folder)
        except OSError:
            linux.exchange(partial, place)
            raise
        take_away(partial)
        return made

    def _replace_in_steps(self, id_: str) -> None:
        place, aside = self._path(id_), self._path(id_, _REPLACED)
        place.rename(aside)
        try:
            sync(self.folder)
            self._path(id_, _PARTIAL).rename(place)
        except OSError:
            aside.rename(place)
            raise
        sync(self.folder)
        take_away(aside)

    def read(self) -> tuple[list[Backup], dict[str, str]]:
        """All backups that can be restored, oldest first; and by name, why other folders cannot.

        ``chain`` is what the backups have now; a merge changes it for those that follow.
        """
        whole: dict[str, Backup] = {}
        damaged = {}
        for name in self._names():
            if name.startswith(".") or name.endswith(_UNREADY) or not (self.folder / name).is_dir():
                continue
            try:
                whole[name] = _chained(read_backup(self.folder / name, name), whole)
            except Damaged as error:
                # Whoever only reads may see one go.
                if (self.folder / name).exists():
                    damaged[name] = error.desc
        for id_ in self._ids(_REPLACED):
            if not self._path(id_).exists():
                damaged[id_] = "a merge was interrupted; `ballastctl backup repair` puts it back"
        return list(whole.values()), damaged

    def backups(self) -> list[Backup]:
        """All backups that can be restored, oldest first."""
        return self.read()[0]

    def last(self) -> Backup | None:
        """The newest backup that can be restored."""
        return next(reversed(self.backups()), None)

    def find(self, id_: str) -> Backup:
        """One backup. NoSuchId, Damaged."""
        return self.chain(id_)[-1]

    def chain(self, id_: str) -> list[Backup]:
        """All that it takes to restore a backup, from the full one to itself. NoSuchId, Damaged."""
        backups, damaged = self.read()
        if id_ in damaged:
            raise Damaged(damaged[id_])
        by_id = {backup.id: backup for backup in backups}
        if id_ not in by_id:
            raise NoSuchId(f"{self.folder} has no backup {id_}")
        links = [by_id[id_]]
        while (base := links[-1].base) is not None:
            links.append(by_id[base])
        return links[::-1]

    def children(self, id_: str) -> list[Backup]:
        """The backups that are based on this one, not on others that are."""
        return [backup for backup in self.backups() if backup.base == id_]

    def partials(self) -> list[str]:
        """Ids of backups that are being made, or were until somebody was killed."""
        return self._ids(_PARTIAL)

    def leftovers(self) -> list[str]:
        """Ids of backups of which a removal or a merge that was interrupted left something."""
        return sorted({*self._ids(_REMOVING), *self._ids(_REPLACED)})

    def discard(self, id_: str) -> None:
        """Take away what ``begin`` made and all that is in it, if it is there."""
        take_away(self._path(id_, _PARTIAL))

    def remove(self, id_: str) -> None:
        """Take a backup out of the catalogue, and away; a damaged one too. NoSuchId, StillNeeded."""
        place, removing = self._path(id_), self._path(id_, _REMOVING)
        if not place.is_dir():
            raise NoSuchId(f"{self.folder} has no backup {id_}")
        backups, damaged = self.read()
        needs = [backup.id for backup in backups if backup.base == id_]
        needs += [name for name in damaged if name != id_ and _may_need(self.folder / name, id_)]
        if needs:
            raise StillNeeded(f"{place} stays: {', '.join(needs)} cannot be restored without it")
        take_away(removing)
        place.rename(removing)
        sync(self.folder)
        take_away(removing)

    def sweep(self) -> list[str]:
        """Take away what others left who were killed; a sentence for each. Only under the lock."""
        said = []
        for id_ in self._ids(_REPLACED):
            place, aside = self._path(id_), self._path(id_, _REPLACED)
            if place.exists():
                take_away(aside)
                said.append(f"{aside}, which was merged into another, is taken away")
            else:
                aside.rename(place)
                sync(self.folder)
                said.append(f"{place} is put back: its merge was interrupted")
        for suffix, what in ((_PARTIAL, "a backup that was not finished"), (_REMOVING, "the rest of a removed backup")):
            for id_ in self._ids(suffix):
                path = self._path(id_, suffix)
                take_away(path)
                said.append(f"{path}, {what}, is taken away")
        return said

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Keep others from changing this catalogue; Busy if one is. The kernel lets go of it when the holder dies."""
        make_folder(self.folder)
        path = self.folder / _LOCK
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                holder = os.pread(fd, _NAME_LIMIT_BYTES, 0).decode(errors="replace").strip() or "another one"
                raise Busy(f"{path} is held by process {holder}, which works on the backups of {self.vm}") from error
            # It is only for people, and no reason to fail on a target that is full.
            with contextlib.suppress(OSError):
                os.ftruncate(fd, os.pwrite(fd, f"{os.getpid()} on {os.uname().nodename}\n".encode(), 0))
            yield
        finally:
            os.close(fd)

    def _path(self, id_: str, suffix: str = "") -> Path:
        if not _ID.fullmatch(id_):
            raise NoSuchId(f"{id_!r} is no id of a backup: expected one like 20261123T181500Z-1a2b3c")
        return self.folder / f"{id_}{suffix}"

    def _names(self) -> list[str]:
        try:
            return sorted(path.name for path in self.folder.iterdir())
        except FileNotFoundError:
            return []

    def _ids(self, suffix: str) -> list[str]:
        ids = [name.removesuffix(suffix) for name in self._names() if name.endswith(suffix)]
        return [id_ for id_ in ids if _ID.fullmatch(id_)]


def _folder_name(vm: str) -> str:
    """``web1``, ``vsock%3A42``: no two names have the same, and none has what qemu-img takes for a protocol."""
    name = quote(vm, safe="", errors="surrogateescape")
    if name.startswith("."):
        name = "%2E" + name[1:]
    if not 0 < len(name) <= _NAME_LIMIT_BYTES:
        raise BadRequest(f"no folder for backups can be named after {vm!r}: it would have {len(name)} bytes")
    return name


def _chained(backup: Backup, earlier: dict[str, Backup]) -> Backup:
    if backup.base is None:
        return dataclasses.replace(backup, chain=backup.id)
    if backup.base not in earlier:
        raise Damaged(f"it is based on {backup.base}, which is missing or damaged")
    return dataclasses.replace(backup, chain=earlier[backup.base].chain)


def _may_need(damaged: Path, id_: str) -> bool:
    """Whether any file of a damaged backup still names that one as its base; one without any file is no proof."""
    try:
        texts = [path.read_bytes() for path in damaged.glob("*.json")]
    except OSError:
        return True
    return not any(texts) or any(id_.encode() in text for text in texts)


def _settle(partial: Path, backup: Backup, images: Sequence[Image]) -> Backup:
    """Write the records, have everything on the disk, and read it as it will be read."""
    write_backup(partial, backup, list(images))
    sync_all(partial)
    return read_backup(partial, backup.id)
