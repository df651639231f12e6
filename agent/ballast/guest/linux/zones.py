"""Memory zones and ranges: ``/proc/zoneinfo`` (mm/vmstat.c) and ``/proc/iomem`` (kernel/resource.c)."""

from __future__ import annotations

import re
from dataclasses import dataclass

_ZONE = re.compile(r"^Node \d+, zone +(\w+)")
_PRESENT = re.compile(r"^ +present +(\d+)")
_RECLAIMABLE = re.compile(r"^ +(?:pages free|nr_zone_inactive_file|nr_zone_active_file) +(\d+)")
_RAM = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) : System RAM", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class ZonePages:
    """Online pages: in ZONE_MOVABLE, which takes only what can be moved again, and in all other zones.

    ``kernel_reclaimable_pages``: of the others, those that are free or hold the contents of files.
    """

    movable_pages: int
    kernel_pages: int
    kernel_reclaimable_pages: int


def parse_zoneinfo(text: str) -> ZonePages:
    """Add up ``present`` (pages that exist and are online) over all nodes."""
    pages = {True: 0, False: 0}
    reclaimable = 0
    movable = False
    for line in text.splitlines():
        if zone := _ZONE.match(line):
            movable = zone.group(1) == "Movable"
        elif present := _PRESENT.match(line):
            pages[movable] += int(present.group(1))
        elif not movable and (found := _RECLAIMABLE.match(line)):
            reclaimable += int(found.group(1))
    return ZonePages(movable_pages=pages[True], kernel_pages=pages[False], kernel_reclaimable_pages=reclaimable)


def parse_ram_ranges(text: str) -> list[tuple[int, int]]:
    """Top-level "System RAM" as [(first byte, bytes)]: one range for each DIMM, as each is added by one call.

    Without CAP_SYS_ADMIN the kernel prints zeros, and then there are no ranges.
    """
    ranges = [(int(first, 16), int(last, 16) + 1 - int(first, 16)) for first, last in _RAM.findall(text)]
    return [(first, size_bytes) for first, size_bytes in ranges if size_bytes > 1]
