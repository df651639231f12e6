"""Counters of memory management: ``/proc/vmstat``, mm/vmstat.c (read for Linux 6.1 and 6.12). Pages, since boot."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Vmstat:
    """What tells of shortage.

    ``refault_*``: pages read back that were driven out not long before (mm/workingset.c). ``stalls``: allocations that
    had to reclaim by themselves (direct reclaim), and ``direct_scanned`` what they looked through; None where the
    kernel does not count them (CONFIG_VM_EVENT_COUNTERS). ``zspages``: memory that compressed pages take.
    """

    refault_anon_pages: int
    refault_file_pages: int
    stalls: int | None
    direct_scanned_pages: int | None
    zspages: int


def parse_vmstat(text: str) -> Vmstat:
    """Parse lines such as ``workingset_refault_file 8211``; others are passed over. ValueError."""
    lines = f"\n{text}\n"
    anon, file = _count(lines, "workingset_refault_anon"), _count(lines, "workingset_refault_file")
    if anon is None or file is None:
        raise ValueError(f"/proc/vmstat lacks the line 'workingset_refault_{'anon' if anon is None else 'file'}'")
    zones = [piece.partition(" ")[0] for piece in lines.split("\nallocstall_")[1:]]
    stalls = [count for zone in zones if (count := _count(lines, f"allocstall_{zone}")) is not None]
    return Vmstat(
        anon, file, sum(stalls) if stalls else None, _count(lines, "pgscan_direct"), _count(lines, "nr_zspages") or 0
    )


def _count(lines: str, name: str) -> int | None:
    """The line of that name; to look for a few takes less than half of parsing two hundred."""
    value = lines.partition(f"\n{name} ")[2].partition("\n")[0]
    return int(value) if value.isdecimal() else None
