"""Records -> tables: which figures a person wants to see, and in which words."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any

from ballast.host.quantity import format_ms, format_size
from ballast.host.show import Table
from ballast.wire.memory_names import LruLists, MemoryStatus, OnlineResult, Pressure
from ballast.wire.message import Event
from ballast.wire.names import (
    AgentStatus,
    FilesystemResult,
    QuiesceBegun,
    QuiesceEnded,
    QuiesceForecast,
    QuiesceStatus,
    Risk,
    WriterResult,
)

_LEVEL_SOURCES = {
    "system": " (by system-wide stalls, the agent's own among them)",
    "vmstat": " (an estimate: the kernel has no PSI)",
}


def agent_table(target: str, status: AgentStatus) -> Table:
    """Version and health of the agent."""
    rows = [
        ("version", f"{status.version}, protocol {status.protocol}"),
        ("features", ", ".join(status.features) or "none"),
        ("boot", status.boot_id),
        ("up", format_ms(status.uptime_ms)),
        ("peers", str(status.peers)),
        ("memory of the agent", format_size(status.rss_bytes)),
        ("pressure events", "yes" if status.psi else "no, the kernel has no PSI"),
        ("balloon pins by", status.pin or "nothing: no balloon"),
        ("guard", status.guard),
        ("holder", status.holder),
        ("longest lease", format_ms(status.limits.lease_ms)),
    ]
    return Table(f"agent at {target}", rows)


def memory_table(memory: MemoryStatus) -> Table:
    """What the guest has, uses and wants."""
    blocks = memory.blocks
    rows = [
        ("total", format_size(memory.total_bytes)),
        ("available", _share(memory.available_bytes, memory.total_bytes)),
        ("free", format_size(memory.free_bytes)),
        ("cached", format_size(memory.cached_bytes)),
        ("committed", format_size(memory.committed_bytes)),
        ("swap used", _swap(memory)),
        *_lru_rows(memory.lru),
        ("level", memory.level + _LEVEL_SOURCES.get(memory.level_source or "slices", "")),
        ("demand", format_size(memory.demand_bytes)),
        *((f"  {part}", format_size(size)) for part, size in memory.demand.items()),
        *_pressure_rows(memory.psi),
        ("balloon", f"{format_size(memory.balloon.bytes)} of {format_size(memory.balloon.target_bytes)} wanted"),
        (
            "blocks",
            f"{blocks.online} online ({blocks.movable_online} movable), {blocks.offline} offline, "
            f"{format_size(blocks.size_bytes)} each",
        ),
    ]
    if memory.kernel_balloon:
        held_bytes = memory.kernel_balloon.bytes
        rows.append((memory.kernel_balloon.driver, "size unknown" if held_bytes is None else format_size(held_bytes)))
    return Table("memory", rows)


def _share(part_bytes: int, total_bytes: int) -> str:
    return f"{format_size(part_bytes)} ({100 * part_bytes / max(total_bytes, 1):.0f} %)"


def _lru_rows(lru: LruLists | None) -> list[tuple[str, str]]:
    if lru is None:
        return []
    lists = {
        "active": (lru.active_anon_bytes, lru.active_file_bytes),
        "inactive": (lru.inactive_anon_bytes, lru.inactive_file_bytes),
    }
    return [
        (name, f"{format_size(anon + file)} ({format_size(anon)} of programs, {format_size(file)} of files)")
        for name, (anon, file) in lists.items()
    ]


def _swap(memory: MemoryStatus) -> str:
    used_bytes = memory.swap_total_bytes - memory.swap_free_bytes
    return f"{format_size(used_bytes)} of {format_size(memory.swap_total_bytes)}" if memory.swap_total_bytes else "none"


def _pressure_rows(psi: Pressure | None) -> list[tuple[str, str]]:
    if psi is None:
        return []
    lines = (("some", psi.some), ("full", psi.full))
    return [
        (f"stalled, {kind}", f"{s.avg10:g} % of 10 s, {s.avg60:g} % of 60 s, {s.avg300:g} % of 300 s")
        for kind, s in lines
    ]


def quiesce_tables(status: QuiesceStatus) -> list[Table]:
    """Whether something is frozen, and for how long yet."""
    rows: list[tuple[str, ...]] = [("state", status.state)]
    if status.id is not None:
        rows.append(("id", status.id))
    if status.lease_left_ms is not None:
        rows.append(("lease left", format_ms(status.lease_left_ms)))
    return [Table("quiesce", rows), *filesystem_tables(status.filesystems, [])]


def forecast_tables(told: QuiesceForecast) -> list[Table]:
    """What a freeze would cover, level by level, what it would leave out, and what may go wrong in it."""
    levels = [(str(number), point) for number, level in enumerate(told.order, 1) for point in level]
    tables = [Table("would be frozen, one level after the other", levels, ("LEVEL", "MOUNT POINT"))] if levels else []
    if told.skip:
        rows = [(one.mountpoint, one.reason) for one in told.skip]
        tables.append(Table("would be left out", rows, ("MOUNT POINT", "REASON")))
    tables += _risk_tables(told.risks)
    sums = [
        ("file systems", str(len(levels))),
        ("risks", str(len(told.risks)) if told.risks else "none"),
        ("to be written first", format_size(told.dirty_bytes)),
    ]
    return [*tables, Table("forecast", sums)]


def _risk_tables(risks: Sequence[Risk]) -> list[Table]:
    rows = [(risk.kind, risk.detail) for risk in risks]
    return [Table("may go wrong", rows, ("RISK", "CULPRIT"))] if rows else []


def begun_tables(begun: QuiesceBegun) -> list[Table]:
    """What a freeze froze."""
    rows = [
        ("id", begun.id),
        ("consistency", begun.consistency),
        ("lease", format_ms(begun.lease_ms)),
        ("sync took", format_ms(begun.sync_ms)),
        ("freeze took", format_ms(begun.freeze_ms)),
    ]
    if begun.dirty_bytes is not None:
        rows.append(("left to write", format_size(begun.dirty_bytes)))
    tables = filesystem_tables(begun.filesystems, begun.writers)
    return [Table("frozen", rows), *tables, *_risk_tables(begun.risks)]


def ended_tables(ended: QuiesceEnded) -> list[Table]:
    """How a freeze ended."""
    return [Table("thawed", _ended_rows(ended)), *filesystem_tables(ended.filesystems, ended.writers)]


def _ended_rows(ended: QuiesceEnded) -> list[tuple[str, ...]]:
    because = [("because", ended.reason)] if ended.reason else []
    held = ("held" if ended.held else "did not hold", format_ms(ended.held_ms))
    return [held, *because, ("thaw took", format_ms(ended.thaw_ms))]


def window_tables(begun: QuiesceBegun, ended: QuiesceEnded | None, status: int) -> list[Table]:
    """Report a whole frozen window: what froze, what the command returned, how it ended."""
    frozen, *parts = begun_tables(begun)
    ending = _ended_rows(ended) if ended else [("did not hold", "as far as can be told")]
    return [*parts, Table("freeze", [*frozen.rows, ("command returned", str(status)), *ending])]


def filesystem_tables(filesystems: Sequence[FilesystemResult], writers: Sequence[WriterResult]) -> list[Table]:
    """One row for each file system, and for each writer that has something to do."""
    tables = []
    if filesystems:
        rows = [(f.mountpoint, f.device, f.type, f.state, format_ms(f.freeze_ms), f.reason or "") for f in filesystems]
        tables.append(Table("file systems", rows, ("MOUNT POINT", "DEVICE", "TYPE", "STATE", "FREEZE", "REASON")))
    if present := [writer for writer in writers if writer.state != "absent"]:
        names = [(w.name, w.state, format_ms(w.ms), w.reason or _detail(w)) for w in present]
        tables.append(Table("writers", names, ("WRITER", "STATE", "TOOK", "")))
    return tables


def _detail(writer: WriterResult) -> str:
    return ", ".join(f"{key} {value}" for key, value in (writer.detail or {}).items())


def online_tables(result: OnlineResult) -> list[Table]:
    """What became of memory blocks."""
    rows = [
        (
            str(block.phys_index),
            block.zone,
            block.result,
            format_ms(block.online_us / 1000) if block.online_us is not None else "",
            block.reason or "",
        )
        for block in result.blocks
    ]
    title = f"{format_size(result.bytes)} brought online"
    return [Table(title, rows, ("BLOCK", "ZONE", "RESULT", "TOOK", "REASON"))]


def event_line(event: Event) -> str:
    """One event: the guest's time, its name, its figures."""
    seconds, microseconds = divmod(event.timestamp_us, 1_000_000)
    try:
        stamp = time.strftime("%H:%M:%S", time.localtime(seconds))
    except (OverflowError, OSError, ValueError):  # whatever the guest's clock says
        stamp = "--:--:--"
    stamp += f".{microseconds // 1000:03d}"
    return " ".join([stamp, event.name, *(f"{key}={_value(value)}" for key, value in event.data.items())])


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
