"""Backups that are too old go; what others need of them is merged into those first."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import datetime
from pathlib import Path

from ballast.host.storage import images
from ballast.host.storage.catalog import Backup, Catalog, Image
from ballast.host.storage.restore import Bar, in_bytes
from ballast.host.storage.retention import Keep, Moment, Plan, plan
from ballast.host.storage.source import BackupFailed
from ballast.host.storage.threads import to_its_end

Working = Callable[[str], AbstractContextManager[None]]


def plan_prune(catalog: Catalog, keep: Keep) -> Plan:
    """What would stay, be merged and go. Blocks; OSError."""
    backups = catalog.backups()
    return plan([Moment(one.id, datetime.fromisoformat(one.made), one.base, one.held) for one in backups], keep)


async def prune(catalog: Catalog, todo: Plan, *, key_file: Path | None, bar: Bar, working: Working) -> None:
    """Do what was planned, under the catalogue's lock: whoever is killed leaves all that stays whole. BackupFailed."""
    for merge_ in todo.merges:
        await merge(catalog, merge_.id, merge_.onto, key_file=key_file, bar=bar)
    for id_ in todo.go:
        with working(f"removing {id_}"):
            await to_its_end(catalog.remove, id_)


async def merge(catalog: Catalog, id_: str, onto: str | None, *, key_file: Path | None, bar: Bar) -> Backup:
    """Rewrite a backup so that it is based on an earlier one of its chain, or on none. BackupFailed, OSError."""
    chain = await to_its_end(catalog.chain, id_)
    old = chain[-1]
    folder = await to_its_end(catalog.begin, id_)
    try:
        await to_its_end(shutil.copytree, catalog.folder / id_ / "machine", folder / "machine")
        merged = [
            await _merge_image(catalog, chain, one, folder, onto=onto, key_file=key_file, bar=bar) for one in old.images
        ]
        new = dataclasses.replace(
            old, kind="incremental" if onto else "full", base=onto, why_full=None if onto else "merged", images=[]
        )
        return await to_its_end(catalog.replace, new, merged)
    finally:
        await to_its_end(catalog.discard, id_)


async def _merge_image(
    catalog: Catalog,
    chain: list[Backup],
    image: Image,
    folder: Path,
    *,
    onto: str | None,
    key_file: Path | None,
    bar: Bar,
) -> Image:
    source, made = catalog.folder / chain[-1].id / image.file, folder / image.file
    backing = f"../{onto}/{image.file}" if onto else None
    with bar(f"merging {chain[-1].id} {image.disk}", image.bytes) as advance:
        tell = in_bytes(advance, image.bytes)
        if image.encrypted:
            if key_file is None:
                raise BackupFailed(f"{source} is encrypted, and cannot be merged without --key-file")
            onto_depth = next((number for number, one in enumerate(chain, 1) if one.id == onto), 0)
            await images.create(made, image.bytes, backing=backing, key_file=key_file)
            await images.rewrite(source, len(chain), made, to_depth=onto_depth + 1, key_file=key_file, advance=tell)
        else:
            await to_its_end(shutil.copyfile, source, made)
            await images.rebase(made, backing, tell)
    encrypted = image.encrypted
    return await to_its_end(Image.of, made, disk=image.disk, bytes_=image.bytes, base=backing, encrypted=encrypted)
