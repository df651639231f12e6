"""Records about more and less memory -> tables."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

from ballast.host.balloon import Outcome
from ballast.host.dimms import Dimm, Removal
from ballast.host.quantity import format_ms, format_size
from ballast.host.show import Table
from ballast.wire.memory_names import BalloonRanges, Decision, OfflineResult, OnlineResult

_STOPPED = {
    "done": "at the target",
    "floor": "at the guest's floor: it gives no more now",
    "gave-way": "the guest needs its memory",
    "interrupted": "interrupted, between two chunks",
    "failed": "failed",
}

_CHANGES = {
    "onlined-movable": "online, movable",
    "onlined-kernel": "online, for the kernel too",
    "online-failed": "not brought online",
    "offlined": "taken offline",
    "offline-failed": "not taken offline",
    "inflated": "into the balloon",
    "not-inflated": "not into the balloon",
    "deflated": "out of the balloon",
    "gave-way": "the balloon gave way",
    "holder-lost": "the balloon's process ended",
    "policy-set": "the kernel's own onlining set",
    "policy-restored": "the kernel's own onlining as it was",
}
_REASONS = {
    "asked": "it was asked for",
    "zone-rule": "hot-added, the zone by the rule",
    "not-unplugged": "it was not unplugged within a minute",
    "floor": "the guest would have too little",
    "pressure": "tasks waited for memory",
    "short": "next to nothing was left",
    "moved": "a page was not where it was pinned",
    "suspend": "the machine goes to sleep",
    "no-room": "what is in use would not fit elsewhere",
    "deadline": "it took too long",
    "kernel": "the kernel said no",
    "killed": "a process was ended from outside",
    "configured": "the configuration says so",
}


def balloon_table(outcome: Outcome) -> Table:
    """How ``balloon set`` ended."""
    rows = [
        ("balloon", f"{format_size(outcome.total_bytes)} of {format_size(outcome.target_bytes)}"),
        ("ended", _STOPPED[outcome.stopped]),
    ]
    if outcome.reason:
        rows.append(("because", outcome.reason))
    if outcome.given_back_bytes:
        rows.append(("given back to the guest", format_size(outcome.given_back_bytes)))
    if outcome.chunks:
        rows.append(("taken from the guest", f"{format_size(outcome.taken_bytes)} in {outcome.chunks} chunks"))
        rows.append(("punched", format_size(outcome.punched_bytes)))
        rows.append(("freed on the host, measured", format_size(outcome.freed_bytes)))
    if outcome.not_zero_bytes:
        rows.append(("not zero, left alone", format_size(outcome.not_zero_bytes)))
    return Table("balloon", rows)


def ranges_table(ranges: BalloonRanges, target_bytes: int) -> Table:
    """What the balloon holds, and where."""
    title = f"balloon: {format_size(ranges.total_bytes)} of {format_size(target_bytes)} wanted, all frames in place"
    return Table(title, [(f"{a:#x}", format_size(n)) for a, n in ranges.ranges], ("ADDRESS", "SIZE"))


def added_tables(dimm: Dimm, online: OnlineResult) -> list[Table]:
    """A DIMM that was plugged in, and where its blocks went."""
    zones = sorted({one.zone for one in online.blocks})
    took_ms = sum(one.online_us or 0 for one in online.blocks) / 1000
    rows = [
        ("address", f"{dimm.address:#x}"),
        ("blocks", f"{len(online.blocks)} online"),
        ("zone", ", ".join(zones)),
    ]
    return [
        Table(f"{dimm.id}: {format_size(dimm.bytes)} added", rows + ([("took", format_ms(took_ms))] * bool(took_ms)))
    ]


def removals_table(removed_bytes: int, removals: Sequence[Removal]) -> Table:
    """What became of DIMMs that were to come off."""
    rows = [(one.id, f"{one.address:#x}", format_size(one.bytes), one.result, one.reason or "") for one in removals]
    return Table(f"{format_size(removed_bytes)} removed", rows, ("DIMM", "ADDRESS", "SIZE", "RESULT", "REASON"))


def offline_tables(result: OfflineResult) -> list[Table]:
    """What became of memory blocks, and which DIMMs can be unplugged."""
    blocks = [(str(one.phys_index), one.zone, one.result, one.reason or "") for one in result.blocks]
    dimms = [(f"{one.address:#x}", format_size(one.bytes), "yes" if one.offline else "no") for one in result.dimms]
    tables = [Table(f"{format_size(result.bytes)} taken offline", blocks, ("BLOCK", "ZONE", "RESULT", "REASON"))]
    return tables + ([Table("DIMMs", dimms, ("ADDRESS", "SIZE", "CAN BE UNPLUGGED"))] if dimms else [])


def decisions_table(decisions: Sequence[Decision]) -> Table:
    """What changed memory, the newest last. Words of a later guest are shown as they come."""
    rows = [
        (
            _moment(one.at_ms),
            _CHANGES.get(one.change, one.change),
            format_size(one.bytes),
            _REASONS.get(one.reason, one.reason),
            ", ".join(f"{name.removesuffix('-bytes')} {_number(name, value)}" for name, value in one.numbers.items()),
        )
        for one in decisions
    ]
    if not rows:
        return Table("no change of memory since the agent started", [])
    return Table("changes of memory", rows, ("WHEN", "WHAT", "SIZE", "WHY", "FROM"))


def _moment(at_ms: int) -> str:
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at_ms // 1000))
    except (OverflowError, OSError, ValueError):  # whatever the guest's clock says
        return "?"


def _number(name: str, value: float) -> str:
    if not math.isfinite(value):
        return "?"
    return format_size(round(value)) if name.endswith("-bytes") else f"{value:.6g}"
