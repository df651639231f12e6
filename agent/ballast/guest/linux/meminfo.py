"""Memory of the whole system: ``/proc/meminfo``, fs/proc/meminfo.c, Documentation/filesystems/proc.rst (6.1, 6.12)."""

from __future__ import annotations

from dataclasses import dataclass


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
    lines = f"\n{text}\n"
    return Meminfo(
        total_bytes=_bytes_of(lines, "MemTotal"),
        free_bytes=_bytes_of(lines, "MemFree"),
        available_bytes=_bytes_of(lines, "MemAvailable"),
        cached_bytes=_bytes_of(lines, "Cached") + _bytes_of(lines, "SReclaimable"),
        active_anon_bytes=_bytes_of(lines, "Active(anon)"),
        inactive_anon_bytes=_bytes_of(lines, "Inactive(anon)"),
        active_file_bytes=_bytes_of(lines, "Active(file)"),
        inactive_file_bytes=_bytes_of(lines, "Inactive(file)"),
        swap_total_bytes=_bytes_of(lines, "SwapTotal"),
        swap_free_bytes=_bytes_of(lines, "SwapFree"),
        swap_cached_bytes=_bytes_of(lines, "SwapCached"),
        zswap_bytes=_bytes_of(lines, "Zswap") if "\nZswap:" in lines else 0,
        committed_bytes=_bytes_of(lines, "Committed_AS"),
    )


def _bytes_of(lines: str, name: str) -> int:
    """The line of that name. Asked for every second by hosts: looking for each takes a third of parsing them all."""
    value, unit, _ = lines.partition(f"\n{name}: ")[2].partition(" kB\n")
    if not unit or not value.strip(" ").isdecimal():
        raise ValueError(f"/proc/meminfo lacks the line '{name}' or its size")
    return 1024 * int(value)
