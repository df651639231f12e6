"""What is known of a backup, as JSON in its folder: ``backup.json``, and for each disk ``DISK.json`` beside its image.

Plain JSON with dashed names, to be read without us as well. Fields that a later version adds are passed over.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, TypeVar

from ballast.wire.errors import AgentError, BadRequest
from ballast.wire.names import FilesystemResult, Risk, WriterResult
from ballast.wire.shape import read_record, to_wire

BACKUP_FILE = "backup.json"

Consistency = Literal["application", "filesystem", "none"]
T = TypeVar("T")


class Damaged(AgentError):
    """A backup is not what its files say, or they say nothing; the text names the file and the field."""


@dataclass(frozen=True, slots=True)
class Image:
    """A disk in a backup: ``bytes`` is its size for a guest, ``image_bytes`` that of ``file``, which has this sum.

    ``base`` is the path of the backing file as the image itself names it, ``../ID/DISK.qcow2``; None: it needs none.
    """

    disk: str
    file: str
    bytes: int
    image_bytes: int
    sha256: str
    base: str | None
    encrypted: bool

    @classmethod
    def of(cls, path: Path, *, disk: str, bytes_: int, base: str | None, encrypted: bool) -> Image:
        """The record of an image that is finished. Reads all of it, and blocks so long; OSError."""
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            return cls(disk, path.name, bytes_, file.tell(), sha256, base, encrypted)


@dataclass(frozen=True, slots=True)
class Backup:
    """A backup. ``made`` is the moment of its cut, ISO 8601; ``chain`` the id of the full backup that it begins with.

    ``level`` is what was asked for, ``consistency`` what a restore may count on. ``held`` is None if nothing was
    frozen. ``images`` are kept in files of their own.
    """

    id: str
    vm: str
    made: str
    kind: Literal["full", "incremental"]
    base: str | None
    chain: str
    why_full: str | None
    level: Consistency
    consistency: Consistency
    held: bool | None
    frozen_ms: float | None
    stall_ms: float | None
    filesystems: list[FilesystemResult]
    writers: list[WriterResult]
    risks: list[Risk]
    disks: list[str]
    provider: Literal["qemu", "libvirt"]
    ballast: str
    images: list[Image] = field(default_factory=list)


def write_backup(folder: Path, backup: Backup, images: list[Image]) -> None:
    """Write all JSON files of a backup; nothing is synced. OSError; Damaged, for a number that is none."""
    for image in images:
        _write(folder / f"{image.disk}.json", to_wire(image))
    about = to_wire(backup)
    del about["images"]
    _write(folder / BACKUP_FILE, about)


def read_backup(folder: Path, id_: str) -> Backup:
    """Read a backup with its images, and see that all files are there, as long as they should be. Damaged."""
    path = folder / BACKUP_FILE
    backup = _read(Backup, path)
    _check(backup, path, id_)
    return dataclasses.replace(backup, images=[_read_image(folder, disk, backup) for disk in backup.disks])


def _check(backup: Backup, path: Path, id_: str) -> None:
    if backup.id != id_:
        raise Damaged(f"{path}: id: expected that of its folder, found {backup.id!r}")
    if (backup.kind == "full") != (backup.base is None):
        raise Damaged(f"{path}: base: expected none in a full backup and one in any other, found {backup.base!r}")
    if backup.base is not None and backup.base >= id_:
        raise Damaged(f"{path}: base: expected an earlier backup, found {backup.base!r}")
    try:
        if datetime.fromisoformat(backup.made).tzinfo is None:
            raise ValueError
    except ValueError as error:
        raise Damaged(f"{path}: made: expected a time with its zone, found {backup.made!r}") from error
    for disk in backup.disks:
        if not _is_plain(disk) or f"{disk}.json" == BACKUP_FILE:
            raise Damaged(f"{path}: disks: {disk!r} is not fit for a file's name here")


def _read_image(folder: Path, disk: str, backup: Backup) -> Image:
    path = folder / f"{disk}.json"
    image = _read(Image, path)
    if image.disk != disk:
        raise Damaged(f"{path}: disk: expected {disk!r}, found {image.disk!r}")
    if not _is_plain(image.file):
        raise Damaged(f"{path}: file: expected one beside it, found {image.file!r}")
    expected = f"../{backup.base}/{image.file}" if backup.base else None
    if image.base != expected:
        raise Damaged(f"{path}: base: expected {expected!r}, found {image.base!r}")
    try:
        found_bytes = (folder / image.file).stat().st_size
    except OSError as error:
        raise Damaged(f"{folder / image.file}: {error.strerror or error}") from error
    if found_bytes != image.image_bytes:
        raise Damaged(f"{folder / image.file}: expected {image.image_bytes} bytes, found {found_bytes}")
    return image


def _is_plain(name: str) -> bool:
    return name not in ("", ".", "..") and not any(character in name for character in "/\0")


def _write(path: Path, value: Any) -> None:
    try:
        text = json.dumps(value, indent=2, allow_nan=False)
    except ValueError as error:
        # A guest can say 1e999, which JSON knows and a double does not.
        raise Damaged(f"{path}: {error}") from error
    path.write_text(f"{text}\n")


def _read(record: type[T], path: Path) -> T:
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise Damaged(f"{path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{path}: this is no JSON: {error}") from error
    if not isinstance(value, dict):
        raise Damaged(f"{path}: expected an object with fields")
    value.pop("images", None)
    try:
        return read_record(record, value)
    except BadRequest as error:
        raise Damaged(f"{path}: {error.desc}") from error
