"""Disks made of backups: each whole by itself, under its name only when all of it is on the disk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from ballast.host.storage import images
from ballast.host.storage.catalog import Backup, Image
from ballast.host.storage.folders import sync
from ballast.host.storage.images import Format
from ballast.host.storage.threads import to_its_end
from ballast.wire.errors import BadRequest, Busy

Bar = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]


async def restore(
    place: Path,
    chain: Sequence[Backup],
    folder: Path,
    *,
    disks: Sequence[str] | None,
    format_: Format,
    overwrite: bool,
    key_file: Path | None,
    bar: Bar,
) -> list[Path]:
    """Make disks of the last backup of a chain that is kept in ``place``; none of them is touched before all can be.

    BadRequest for a disk that the backup has not, or a file that is there already; Busy if it is in use; BackupFailed.
    """
    backup = chain[-1]
    if unknown := set(disks or ()) - set(backup.disks):
        raise BadRequest(f"{backup.id} has no disk {', '.join(sorted(unknown))}, but {', '.join(backup.disks)}")
    wanted = [image for image in backup.images if not disks or image.disk in disks]
    made = [folder / f"{image.disk}.{format_}" for image in wanted]
    for path in made:
        await _check_free(path, format_, overwrite=overwrite)
    await to_its_end(_make_folder, folder)
    for image, path in zip(wanted, made, strict=True):
        source = place / backup.id / image.file
        await _make(source, image, path, depth=len(chain), format_=format_, key_file=key_file, bar=bar)
    return made


async def _check_free(path: Path, format_: Format, *, overwrite: bool) -> None:
    if not await to_its_end(path.exists):
        return
    if not overwrite:
        raise BadRequest(f"{path} is there already; --overwrite replaces it")
    if await images.is_in_use(path, format_):
        raise Busy(f"{path} is in use by a machine; turn that off first")


async def _make(
    source: Path, image: Image, path: Path, *, depth: int, format_: Format, key_file: Path | None, bar: Bar
) -> None:
    partial = path.with_name(f"{path.name}.partial")
    await to_its_end(partial.unlink, missing_ok=True)
    try:
        with bar(f"restoring {image.disk}", image.bytes) as advance:
            key = key_file if image.encrypted else None
            await images.convert(
                source, partial, format_=format_, depth=depth, key_file=key, advance=in_bytes(advance, image.bytes)
            )
        await to_its_end(_put, partial, path)
    finally:
        await to_its_end(partial.unlink, missing_ok=True)


def in_bytes(advance: Callable[[int], None], total_bytes: int) -> Callable[[float], None]:
    """Make of a bar that counts bytes one that is told shares of them, 0 to 1."""
    done_bytes = 0

    def tell(share: float) -> None:
        nonlocal done_bytes
        now_bytes = round(share * total_bytes)
        advance(now_bytes - done_bytes)
        done_bytes = now_bytes

    return tell


def _make_folder(folder: Path) -> None:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)


def _put(partial: Path, path: Path) -> None:
    sync(partial, 0o600)
    partial.rename(path)
    sync(path.parent)
