"""What a target holds: which machines have backups there."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from ballast.host.storage.catalog import Backup, Catalog


@dataclass(frozen=True, slots=True)
class Holding:
    """A machine's backups: how many there are, how many are damaged, what the images take, and the newest whole one."""

    vm: str
    backups: int
    damaged: int
    bytes: int
    last: Backup | None


def read_holdings(target: Path) -> list[Holding]:
    """All machines with a folder in ``target``, by name; none if there is no target. OSError."""
    names = sorted(path.name for path in target.iterdir() if path.is_dir()) if target.is_dir() else []
    return [holding for name in names if (holding := _read(target, unquote(name)))]


def _read(target: Path, vm: str) -> Holding | None:
    backups, damaged = Catalog(target, vm).read()
    if not backups and not damaged:
        return None
    bytes_ = sum(image.image_bytes for backup in backups for image in backup.images)
    return Holding(vm, len(backups), len(damaged), bytes_, backups[-1] if backups else None)
