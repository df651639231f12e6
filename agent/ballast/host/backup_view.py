"""Backups as tables: one line each, or one with all that is known of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ballast.host.quantity import format_ms, format_size
from ballast.host.show import Table
from ballast.host.storage.catalog import Backup
from ballast.host.storage.filesystems import FilesystemCheck
from ballast.host.storage.holdings import Holding
from ballast.host.storage.retention import Plan
from ballast.host.storage.trial import Trial


def is_partial(backup: Backup) -> bool:
    """Whether a part that should have been frozen was not."""
    states = {one.state for one in backup.filesystems} | {one.state for one in backup.writers}
    return bool(states & {"failed", "freezing", "timed-out"})


def list_tables(vm: str, backups: Sequence[Backup], damaged: Mapping[str, str]) -> list[Table]:
    """All backups, oldest first, and what looks like one and cannot be read."""
    rows = [
        (one.id, one.made, _kind(one), one.consistency, _held(one), format_size(_image_bytes(one))) for one in backups
    ]
    columns = ("backup", "made", "kind", "consistent", "freeze", "size")
    tables = [Table(f"Backups of {vm}", rows or [("none", "", "", "", "", "")], columns)]
    if damaged:
        tables.append(Table("Damaged", list(damaged.items()), ("folder", "why")))
    return tables


def holdings_tables(holdings: Sequence[Holding]) -> list[Table]:
    """One line for each machine."""
    rows = [
        (
            one.vm,
            str(one.backups) + (f", {one.damaged} damaged" if one.damaged else ""),
            one.last.made if one.last else "none that can be restored",
            one.last.consistency if one.last else "",
            format_size(one.bytes),
        )
        for one in holdings
    ]
    return [Table("Backups", rows or [("none", "", "", "", "")], ("machine", "backups", "last", "consistent", "size"))]


def backup_tables(backup: Backup, chain: Sequence[Backup] = ()) -> list[Table]:
    """One backup; with its chain, the full one first."""
    about = [
        ("made", backup.made),
        ("kind", _kind(backup)),
        *([("because", backup.why_full)] if backup.why_full and backup.why_full != "asked for" else []),
        ("consistent", f"{backup.consistency} (asked: {backup.level})"),
        ("freeze", _held(backup)),
        *([("the guest stalled for at most", format_ms(backup.stall_ms))] if backup.stall_ms is not None else []),
    ]
    tables = [Table(f"Backup {backup.id} of {backup.vm}", about)]
    rows = [(one.disk, format_size(one.bytes), format_size(one.image_bytes), one.sha256[:16]) for one in backup.images]
    tables.append(Table("Disks", rows, ("disk", "size", "takes", "sha256")))
    if backup.filesystems:
        frozen = [
            (f.mountpoint, f.type, str(f.state), format_ms(f.freeze_ms), f.reason or "") for f in backup.filesystems
        ]
        tables.append(Table("File systems", frozen, ("mount point", "type", "state", "froze in", "reason")))
    if backup.writers:
        writers = [(w.name, str(w.state), format_ms(w.ms), w.reason or "") for w in backup.writers]
        tables.append(Table("Writers", writers, ("writer", "state", "took", "reason")))
    if len(chain) > 1:
        rows = [(one.id, one.made, _kind(one), format_size(_image_bytes(one))) for one in chain]
        tables.append(Table("To restore it, all of these are needed", rows, ("backup", "made", "kind", "size")))
    return tables


def repair_tables(said: Sequence[str]) -> list[Table]:
    """What was done."""
    return [Table("Repaired", [(sentence,) for sentence in said] or [("nothing was left",)], ("",))]


def verify_tables(
    chain: Sequence[Backup], wrong: Sequence[str], filesystems: Sequence[FilesystemCheck] | None, booted: Trial | None
) -> list[Table]:
    """What was found; None: nobody looked at the file systems, it was not booted."""
    about = [("needs", ", ".join(one.id for one in chain)), ("verdict", "damaged" if wrong else "whole")]
    if booted and booted.agent:
        about.append(("boot", f"its agent, {booted.agent}, answered after {booted.boot_s:.0f} s"))
    tables = [Table(f"Backup {chain[-1].id} of {chain[-1].vm}", [*about, *(("wrong", one) for one in wrong)])]
    if filesystems is not None:
        rows = [(one.name, one.type, "damaged" if one.wrong else one.skipped or "clean") for one in filesystems]
        tables.append(Table("File systems", rows, ("where", "type", "verdict")))
    return tables


def restore_tables(backup: Backup, made: Sequence[Path]) -> list[Table]:
    """The disks that were made."""
    return [Table(f"Restored from {backup.id}, made {backup.made}", [(str(path),) for path in made], ("disk",))]


def prune_tables(todo: Plan, *, is_done: bool) -> list[Table]:
    """What stays and why, what was rewritten, what went."""
    rows = [(id_, "stays", ", ".join(reasons)) for id_, reasons in todo.stay.items()]
    rows += [(one.id, "merged", f"onto {one.onto}" if one.onto else "is full now") for one in todo.merges]
    rows += [(id_, "went" if is_done else "would go", "") for id_ in todo.go]
    return [Table("Pruned" if is_done else "What pruning would do", rows, ("backup", "what", "why"))]


def _kind(backup: Backup) -> str:
    return "full" if backup.kind == "full" else f"on {backup.base}"


def _held(backup: Backup) -> str:
    return {None: "not frozen", True: "held", False: "did not hold"}[backup.held]


def _image_bytes(backup: Backup) -> int:
    return sum(image.image_bytes for image in backup.images)
