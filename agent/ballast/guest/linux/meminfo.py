"""Memory of the whole system: ``/proc/meminfo``, fs/proc/meminfo.c, Documentation/filesystems/proc.rst (6.1, 6.12)."""

from __future__ import annotations

import re
from dataclasses import dataclass

_LINE = re.compile(r"^([A-Za-z_]+(?:\([a-z]+\))?): +(\d+) kB$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Meminfo:
    """Bytes. ``available`` is what programs could get without swapping, the kernel's estimate.

    ``cached`` is page cache and reclaimable slab, as free(1) counts it. The lists are those that reclaim goes through,
    also of the multi-generational LRU, whose two youngest generations are the active ones. ``swap_cached`` is in memory
    and in swap at once; ``zswap`` is the memory that compressed swap takes, 0 without it.
    """

    total_bytes: int
    free_bytes: int
    available_bytes: int
    cached_bytes: int
    active_anon_bytes: int
    inactive_anon_bytes: int
    active_file_bytes: int
    inactive_file_bytes: int
    swap_total_bytes: int
    swap_free_bytes: int
    swap_cached_bytes: int
    zswap_bytes: int
    committed_bytes: int


def parse_meminfo(text: str) -> Meminfo:
    """Parse lines such as ``MemAvailable:     990460 kB``; lines of later kernels are passed over. ValueError."""
    kib = dict(_LINE.findall(text))

    def bytes_of(*names: str) -> int:
        return 1024 * sum(int(kib[name]) for name in names)

    try:
        return Meminfo(
            total_bytes=bytes_of("MemTotal"),
            free_bytes=bytes_of("MemFree"),
            available_bytes=bytes_of("MemAvailable"),
            cached_bytes=bytes_of("Cached", "SReclaimable"),
            active_anon_bytes=bytes_of("Active(anon)"),
            inactive_anon_bytes=bytes_of("Inactive(anon)"),
            active_file_bytes=bytes_of("Active(file)"),
            inactive_file_bytes=bytes_of("Inactive(file)"),
            swap_total_bytes=bytes_of("SwapTotal"),
            swap_free_bytes=bytes_of("SwapFree"),
            swap_cached_bytes=bytes_of("SwapCached"),
            zswap_bytes=1024 * int(kib.get("Zswap", 0)),
            committed_bytes=bytes_of("Committed_AS"),
        )
    except KeyError as error:
        raise ValueError(f"/proc/meminfo lacks the line {error}") from error
