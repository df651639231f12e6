"""How much may be taken, and when some must be given back."""

from __future__ import annotations

import pytest

from ballast.guest.linux.zones import ZonePages
from ballast.guest.memory.floor import Readings, floor_bytes, relief_bytes, room_bytes

MIB = 1 << 20


def readings(
    *, available_mib: int, free_mib: int = 0, balloon_mib: int = 0, movable_mib: int = 0, kernel_left_mib: int = 4096
) -> Readings:
    """A guest with 1 GiB that the kernel can use, and perhaps movable memory besides."""
    pages = ZonePages(movable_mib * 256, 1024 * 256, kernel_left_mib * 256)
    total_bytes = (1024 + movable_mib) * MIB
    return Readings(total_bytes, available_mib * MIB, free_mib * MIB, pages, 4096, balloon_mib * MIB)


@pytest.mark.parametrize(("total_mib", "floor_mib"), [(128, 72), (512, 168), (2048, 360), (8192, 744), (32768, 1512)])
def test_the_floor_is_that_of_the_hyper_v_driver(total_mib: int, floor_mib: int) -> None:
    assert floor_bytes(total_mib * MIB) == floor_mib * MIB


def test_it_never_falls_as_memory_grows() -> None:
    floors = [floor_bytes(total_mib * MIB) for total_mib in range(64, 16384, 16)]
    assert floors == sorted(floors)


@pytest.mark.parametrize(
    ("now", "room_mib"),
    [
        (readings(available_mib=800), 800 - 232),
        (readings(available_mib=232), 0),
        (readings(available_mib=5), 0),
        # Much that is available, but movable: nothing for the kernel itself.
        (readings(available_mib=3000, movable_mib=2048, kernel_left_mib=300), 300 - 232),
        # Movable memory stays within three times what the kernel has left.
        (readings(available_mib=3000, movable_mib=2304), 1024 - 768),
        (readings(available_mib=3000, movable_mib=2304, balloon_mib=200), 56),
        (readings(available_mib=3000, movable_mib=3072), 0),
    ],
)
def test_room(now: Readings, room_mib: int) -> None:
    assert room_bytes(now) == room_mib * MIB


@pytest.mark.parametrize(
    ("now", "relief_mib"),
    [
        (readings(available_mib=300, free_mib=300, balloon_mib=512), 0),
        (readings(available_mib=200, free_mib=100, balloon_mib=512), 2 * 232 - 100),
        (readings(available_mib=200, free_mib=200, balloon_mib=800), 400),
        (readings(available_mib=10, free_mib=5, balloon_mib=64), 64),
        (readings(available_mib=10, free_mib=5, balloon_mib=0), 0),
    ],
)
def test_relief(now: Readings, relief_mib: int) -> None:
    assert relief_bytes(now) == relief_mib * MIB
