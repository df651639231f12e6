"""Ranges that a guest names: which are taken, and where they are on the host."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ballast.host.machine import PAGE_BYTES, MemoryMap, Piece, Region, WrongRanges, checked

MIB = 1 << 20
MAP = MemoryMap([Region(MIB, 7 * MIB, 10, MIB, "low"), Region(16 * MIB, MIB, 10, 8 * MIB, "high")])


@pytest.mark.parametrize(
    ("ranges", "problem"),
    [
        ([[]], "no range"),
        ([[MIB]], "no range"),
        ([[MIB, 4096, 4096]], "no range"),
        ([[MIB, True]], "no range"),
        ([[MIB, 4096.0]], "no range"),
        ([["1048576", 4096]], "no range"),
        ([[MIB + 1, 4096]], "whole pages"),
        ([[MIB, 4095]], "whole pages"),
        ([[MIB, 0]], "whole pages"),
        ([[MIB, -4096]], "whole pages"),
        ([[0, 4096]], "in the first MiB"),
        ([[-4096, 4096]], "in the first MiB"),
        ([[MIB - 4096, 8192]], "in the first MiB"),
        ([[2 * MIB, 4096], [2 * MIB, 4096]], "twice, or after a higher"),
        ([[2 * MIB, 8192], [2 * MIB + 4096, 8192]], "twice, or after a higher"),
        ([[3 * MIB, 4096], [2 * MIB, 4096]], "twice, or after a higher"),
    ],
)
def test_ranges_that_are_none_are_refused(ranges: Any, problem: str) -> None:
    with pytest.raises(WrongRanges, match=problem):
        checked(ranges)
    with pytest.raises(WrongRanges, match=problem):
        checked([[64 * MIB, 4096], *ranges] if "twice" not in problem else ranges)


@pytest.mark.parametrize("held", [[[2 * MIB, MIB]], [[MIB, 16 * MIB]], [[3 * MIB - 4096, 8192]], [[3 * MIB, 4096]]])
def test_what_was_given_back_before_is_refused(held: list[list[int]]) -> None:
    ranges = [[2 * MIB, 2 * MIB]]
    with pytest.raises(WrongRanges, match="gave back a part before"):
        checked(ranges, held)
    assert checked(ranges, [[4 * MIB, MIB], [MIB, MIB]]) == ranges


@pytest.mark.parametrize(
    "ranges", [[[8 * MIB, 4096]], [[7 * MIB, 2 * MIB]], [[MIB, 16 * MIB]], [[16 * MIB, 2 * MIB]], [[1 << 64, 4096]]]
)
def test_what_is_no_ram_is_refused(ranges: list[list[int]]) -> None:
    with pytest.raises(WrongRanges, match="where it has no RAM"):
        MAP.locate(ranges)


def test_a_place_in_the_file_is_that_of_its_region() -> None:
    assert MAP.locate([[MIB, 4096], [7 * MIB, MIB], [16 * MIB + 4096, 8192]]) == [
        Piece(10, MIB, 4096),
        Piece(10, 7 * MIB, MIB),
        Piece(10, 8 * MIB + 4096, 8192),
    ]


_pages = st.integers(-4, 40 * 256).map(lambda page: page * PAGE_BYTES)


@given(st.lists(st.lists(_pages, min_size=2, max_size=2), max_size=4))
def test_every_byte_that_is_located_was_named_and_is_ram(ranges: list[list[int]]) -> None:
    try:
        pieces = MAP.locate(ranges)
    except WrongRanges:
        return
    assert sum(piece.bytes for piece in pieces) == sum(bytes_ for _, bytes_ in ranges)
    for piece in pieces:
        region = next(one for one in MAP.regions if one.offset <= piece.offset < one.offset + one.bytes)
        assert piece.offset + piece.bytes <= region.offset + region.bytes
        address = region.address + piece.offset - region.offset
        assert any(first <= address and address + piece.bytes <= first + bytes_ for first, bytes_ in ranges)
