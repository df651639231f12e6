"""Counters of memory management: ``/proc/vmstat``, mm/vmstat.c (read for Linux 6.1 and 6.12). Pages, since boot."""

from __future__ import annotations

import re
from dataclasses import dataclass

_LINE = re.compile(r"^(workingset_refault_(?:anon|file)|allocstall_\w+|pgscan_direct|nr_zspages) (\d+)$", re.MULTILINE)


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
    counts = {name: int(number) for name, number in _LINE.findall(text)}
    stalls = [number for name, number in counts.items() if name.startswith("allocstall_")]
    try:
        return Vmstat(
            refault_anon_pages=counts["workingset_refault_anon"],
            refault_file_pages=counts["workingset_refault_file"],
            stalls=sum(stalls) if stalls else None,
            direct_scanned_pages=counts.get("pgscan_direct"),
            zspages=counts.get("nr_zspages", 0),
        )
    except KeyError as error:
        raise ValueError(f"/proc/vmstat lacks the line {error}") from error
