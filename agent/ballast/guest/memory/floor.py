"""How much memory the balloon may take, and when it must give some back: pure functions over readings.

Two floors and a rule. What programs can still get (MemAvailable) must not fall below the floor of the Hyper-V driver
(compute_balloon_floor in drivers/hv/hv_balloon.c), and neither may what the kernel itself can still get, since it
cannot use movable memory. And movable memory stays within three times what the kernel has left (the zone rule).
"""

from __future__ import annotations

from dataclasses import dataclass

from ballast.guest.linux.meminfo import parse_meminfo
from ballast.guest.linux.tree import Tree
from ballast.guest.linux.zones import ZonePages, parse_zoneinfo

MOVABLE_RATIO = 3
_MIB = 1 << 20
_PAGE_BYTES = 4096  # zoneinfo counts base pages
# Up to a total of (MiB): a base and a share of the total.
_FLOORS = ((128, 8, 2), (512, 40, 4), (2048, 104, 8), (8192, 232, 16))
_FLOOR_ABOVE = (488, 32)


@dataclass(frozen=True, slots=True)
class Readings:
    """One look at the guest: /proc/meminfo in bytes, /proc/zoneinfo in pages, and what the balloon holds."""

    total_bytes: int
    available_bytes: int
    free_bytes: int
    zones: ZonePages
    page_bytes: int
    balloon_bytes: int

    def numbers(self) -> dict[str, int]:
        """What a decision was made from, to be noted with it."""
        return {
            "total_bytes": self.total_bytes,
            "available_bytes": self.available_bytes,
            "free_bytes": self.free_bytes,
            "floor_bytes": floor_bytes(self.total_bytes),
            "room_bytes": room_bytes(self),
            "movable_bytes": self.zones.movable_pages * self.page_bytes,
            "kernel_bytes": self.zones.kernel_pages * self.page_bytes,
            "balloon_bytes": self.balloon_bytes,
        }


def read_now(tree: Tree, balloon_bytes: int) -> Readings:
    """Look. May run while frozen."""
    memory = parse_meminfo(tree.read("proc/meminfo"))
    zones = parse_zoneinfo(tree.read("proc/zoneinfo"))
    return Readings(memory.total_bytes, memory.available_bytes, memory.free_bytes, zones, _PAGE_BYTES, balloon_bytes)


def floor_bytes(total_bytes: int) -> int:
    """What must stay available of ``total_bytes``: 72 MiB of 128, 168 of 512, 232 of 1 GiB, 744 of 8 GiB."""
    for limit_mib, base_mib, share in _FLOORS:
        if total_bytes < limit_mib * _MIB:
            return base_mib * _MIB + total_bytes // share
    base_mib, share = _FLOOR_ABOVE
    return base_mib * _MIB + total_bytes // share


def urgent_bytes(total_bytes: int) -> int:
    """With less than this available the balloon gives way whether anything stalls or not."""
    return floor_bytes(total_bytes) // 2


def room_bytes(now: Readings) -> int:
    """How much more the balloon may take; 0 at a floor."""
    kernel_bytes = now.zones.kernel_pages * now.page_bytes
    movable_bytes = now.zones.movable_pages * now.page_bytes
    reclaimable_bytes = now.zones.kernel_reclaimable_pages * now.page_bytes
    room = min(
        now.available_bytes - floor_bytes(now.total_bytes),
        reclaimable_bytes - floor_bytes(kernel_bytes),
        kernel_bytes - now.balloon_bytes - movable_bytes // MOVABLE_RATIO,
    )
    return max(0, room)


def relief_bytes(now: Readings) -> int:
    """How much to give back at critical pressure; 0 where memory is not what is short (a cgroup at its own limit).

    Half of the balloon at least, since the next look may come too late, and enough to have twice the floor again.
    """
    floor = floor_bytes(now.total_bytes)
    left_bytes = min(now.available_bytes, now.free_bytes)
    if left_bytes >= floor:
        return 0
    return min(now.balloon_bytes, max(now.balloon_bytes // 2, 2 * floor - left_bytes))
