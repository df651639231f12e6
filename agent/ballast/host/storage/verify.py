"""Whether a backup can be restored: everything that it takes is read, and compared with what the catalogue says."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

from ballast.host.storage import images
from ballast.host.storage.catalog import Backup, Image
from ballast.host.storage.restore import Bar
from ballast.host.storage.source import BackupFailed
from ballast.host.storage.threads import to_its_end

_PIECE_BYTES = 4 << 20


async def verify(place: Path, chain: Sequence[Backup], *, key_file: Path | None, bar: Bar) -> list[str]:
    """All that is wrong with a chain of backups that is kept in ``place``; a sentence each, none if it is whole.

    Reads as much as the images have; OSError is the target's.
    """
    wrong = []
    for depth, backup in enumerate(chain, 1):
        for image in backup.images:
            path = place / backup.id / image.file
            with bar(f"reading {backup.id} {image.disk}", image.image_bytes) as advance:
                found = await to_its_end(_sum, path, advance)
            if found != image.sha256:
                wrong.append(f"{path}: its checksum is not the one it had when it was made")
                continue
            wrong += [f"{path}: {what}" for what in await _look_into(path, image, depth, key_file)]
    return wrong


async def _look_into(path: Path, image: Image, depth: int, key_file: Path | None) -> list[str]:
    """What is wrong with an image that is as it was made."""
    try:
        info = await images.read_info(path)
    except BackupFailed as error:
        return [error.desc]
    wrong = []
    if info.backing != image.base:
        wrong.append(f"it is based on {info.backing}, not on {image.base}")
    if info.bytes < image.bytes:
        wrong.append(f"it has {info.bytes} bytes for a guest, not {image.bytes}")
    if image.encrypted and key_file is None:
        return [*wrong, "it is encrypted, and without --key-file nobody can look into it"]
    structure = await images.check(path, depth=depth, key_file=key_file if image.encrypted else None)
    return [*wrong, *([structure] if structure else [])]


def _sum(path: Path, advance: Callable[[int], None]) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_PIECE_BYTES):
            digest.update(piece)
            advance(len(piece))
    return digest.hexdigest()
