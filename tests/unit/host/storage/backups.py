"""Backups for tests of the catalogue: small files in the place of images, and records that are right."""

from __future__ import annotations

from datetime import UTC, datetime

from ballast.host.storage.catalog import Catalog
from ballast.host.storage.record import Backup, Image
from ballast.wire.names import FilesystemResult, Risk, WriterResult

NOW = datetime(2026, 11, 23, 18, 15, tzinfo=UTC)
DISKS = ("vda", "data")


def begin(catalog: Catalog, id_: str, base: str | None, content: bytes = b"blocks") -> tuple[Backup, list[Image]]:
    """Make a backup's folder and what is in it, as far as it goes before the commit."""
    folder = catalog.begin(id_)
    (folder / "machine").mkdir()
    (folder / "machine" / "command-line.json").write_text("[]")
    images = []
    for disk in DISKS:
        path = folder / f"{disk}.qcow2"
        path.write_bytes(content)
        backing = f"../{base}/{path.name}" if base else None
        images.append(Image.of(path, disk=disk, bytes_=1 << 30, base=backing, encrypted=False))
    return record(catalog, id_, base), images


def record(catalog: Catalog, id_: str, base: str | None) -> Backup:
    """What there is to say of a backup on plain QEMU under a database."""
    return Backup(
        id=id_,
        vm=catalog.vm,
        made="2026-11-23T18:15:00.123+00:00",
        kind="incremental" if base else "full",
        base=base,
        chain=base or id_,
        why_full=None if base else "there is no backup yet",
        level="application",
        consistency="application",
        held=True,
        frozen_ms=41.5,
        stall_ms=60.0,
        filesystems=[FilesystemResult("/", "/dev/vda1", "ext4", "thawed", freeze_ms=4.5)],
        writers=[WriterResult("postgresql", "thawed", detail={"lsn": "0/1"})],
        risks=[Risk("logger", "journald writes to /var/log")],
        disks=list(DISKS),
        provider="qemu",
        ballast="0.1",
    )


def make(catalog: Catalog, base: str | None = None, content: bytes = b"blocks") -> str:
    """A backup that is in the catalogue; its id."""
    id_ = catalog.new_id(NOW)
    catalog.commit(*begin(catalog, id_, base, content))
    return id_
