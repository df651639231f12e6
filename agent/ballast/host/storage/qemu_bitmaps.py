"""QEMU's notes of what changed since a backup: one bitmap on each disk, named after the backup.

Around a cut two of them record, so that a block may be in both and none is in neither. All changes are transactions
over all disks (QEMU 10.0, qapi/transaction.json). A qcow2 image keeps its bitmap over a restart of QEMU; after a crash
QEMU calls it inconsistent, and it is good for nothing but to be removed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ballast.host.qmp import Qmp
from ballast.host.storage.qemu_disks import QemuDisk
from ballast.host.storage.source import PREFIX


def bitmap_of(backup: str) -> str:
    """The name of the bitmap that tells what changed since a backup."""
    return PREFIX + backup


def why_full(disk: QemuDisk, base: str) -> str | None:
    """Why no increment on ``base`` can be made of this disk; None if it can."""
    bitmap = disk.bitmaps.get(bitmap_of(base))
    if bitmap is None:
        kept = "" if disk.keeps_bitmaps else "; its image cannot keep notes over a restart of QEMU, only qcow2 can"
        return f"{disk.name} has no notes of what changed since {base}{kept}"
    if not bitmap.is_whole:
        return f"{disk.name}'s notes of what changed since {base} are not whole: QEMU crashed, or they are in use"
    return None


async def note(qmp: Qmp, disks: Sequence[QemuDisk], new: str) -> None:
    """Begin to note what changes on all disks. QmpFailed: on none."""
    await _run(
        qmp,
        [_action("add", disk, name=bitmap_of(new), persistent=disk.keeps_bitmaps) for disk in disks],
    )


async def close(qmp: Qmp, disks: Sequence[QemuDisk], base: str) -> None:
    """Note no more what changes since ``base``: ``note`` does, since before the cut."""
    await _run(qmp, [_action("disable", disk, name=bitmap_of(base)) for disk in disks])


async def settle(qmp: Qmp, disks: Sequence[QemuDisk], last: str | None) -> int:
    """Have each disk note what changed since ``last``, the last backup in the catalogue, and nothing else.

    Notes of a later backup, one that was not finished, are added to those of ``last``; if not all of them can be, none
    are kept, and the next backup is a full one. Returns how many bitmaps went. Each disk by itself, all or nothing.
    """
    gone = 0
    for disk in disks:
        actions = _settled(disk, last)
        gone += sum(action["type"].endswith("remove") for action in actions)
        await _run(qmp, actions)
    return gone


def _settled(disk: QemuDisk, last: str | None) -> list[dict[str, Any]]:
    keep = bitmap_of(last) if last else ""
    later = [name for name in disk.bitmaps if name > keep]
    others = [name for name in disk.bitmaps if name != keep]
    if keep not in disk.bitmaps or disk.bitmaps[keep].is_inconsistent:
        return [_action("remove", disk, name=name) for name in disk.bitmaps]
    if any(disk.bitmaps[name].is_inconsistent for name in later):
        return [_action("remove", disk, name=name) for name in disk.bitmaps]
    merge = [_action("merge", disk, target=keep, bitmaps=later)] if later else []
    enable = [] if disk.bitmaps[keep].is_recording else [_action("enable", disk, name=keep)]
    if enable and not later:
        # Somebody else stopped it, and what changed since then nobody knows.
        return [_action("remove", disk, name=name) for name in disk.bitmaps]
    return [*enable, *merge, *(_action("remove", disk, name=name) for name in others)]


def _action(verb: str, disk: QemuDisk, **data: Any) -> dict[str, Any]:
    return {"type": f"block-dirty-bitmap-{verb}", "data": {"node": disk.node, **data}}


async def _run(qmp: Qmp, actions: Sequence[Mapping[str, Any]]) -> None:
    if actions:
        await qmp.run("transaction", actions=list(actions))
