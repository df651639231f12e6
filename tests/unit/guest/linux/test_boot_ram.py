"""The firmware's memory map, out of x86's boot parameters."""

from __future__ import annotations

import struct

import pytest

from ballast.guest.linux.boot_ram import BOOT_PARAMS, parse_boot_ram
from ballast.guest.linux.tree import Tree


@pytest.mark.parametrize("data", [b"", b"\0" * 0x2D0, b"\0" * (0x2D0 + 128 * 20 - 1), b"\xff" * 4096])
def test_what_is_no_boot_parameters_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="e820"):
        parse_boot_ram(data)


def test_recorded_guests_booted_with_1_gib(recorded: Tree) -> None:
    low, high = parse_boot_ram(recorded.path(BOOT_PARAMS).read_bytes())
    assert low == (0, 0x9FC00)
    assert high[0] == 1 << 20
    assert (1 << 30) - (1 << 20) < sum(high) <= 1 << 30


def test_only_ram_and_only_what_is_counted() -> None:
    data = bytearray(4096)
    data[0x1E8] = 2
    for number, entry in enumerate([(0x1000, 0x2000, 2), (0x8000, 0x1000, 1), (0x10000, 0x1000, 1)]):
        struct.pack_into("<QQI", data, 0x2D0 + 20 * number, *entry)
    assert parse_boot_ram(bytes(data)) == [(0x8000, 0x1000)]
