"""Pressure files: bad ones first, then real ones, then what later kernels may add."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ballast.guest.linux.psi import StallFile, StallLine, open_trigger, parse_stalls
from ballast.guest.linux.tree import Tree

SOME = "some avg10=0.22 avg60=0.17 avg300=1.11 total=58761459\n"
FULL = "full avg10=0.23 avg60=0.16 avg300=1.08 total=58464525\n"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "garbage",
        SOME,
        FULL,
        SOME + FULL + FULL,
        SOME + "full",
        SOME + "full avg10=0.23 avg60=0.16 avg300=1.08",
        SOME + "full avg10=0.23 avg60=0.16 avg300=1.08 total",
        SOME + "full avg10=0.23 avg60=0.16 avg300=1.08 total=58=5",
        SOME + "full avg10=0.23 avg10=0.23 avg60=0.16 avg300=1.08 total=5",
        SOME + "full avg10=0.23 avg60=0.16 avg300=1.08 total=5.5",
        SOME + "full avg10=0,23 avg60=0.16 avg300=1.08 total=5",
        SOME + "full 0.22=55 avg60=0.16 avg300=1.08 total=5",
    ],
)
def test_what_is_no_pressure_file_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - some texts are Python's
        parse_stalls(text)


def test_a_pressure_file_is_read_in_any_order() -> None:
    expected = StallFile(StallLine(0.22, 0.17, 1.11, 58761459), StallLine(0.23, 0.16, 1.08, 58464525))
    assert parse_stalls(SOME + FULL) == expected
    assert parse_stalls(FULL + SOME) == expected


def test_fields_and_lines_of_later_kernels_are_passed_over() -> None:
    later = SOME.replace("\n", " avg600=0.01 words=yes\n") + FULL + "most avg10=0.00\n"
    assert parse_stalls(later) == parse_stalls(SOME + FULL)


@given(st.text(alphabet="someful avg10=.\n", max_size=80))
def test_nothing_but_value_error_comes_out_of_any_text(text: str) -> None:
    try:
        parse_stalls(SOME + text)
    except ValueError:
        return


def test_recorded(recorded: Tree) -> None:
    stalls = parse_stalls(recorded.read("proc/pressure/memory"))
    assert 0 <= stalls.full.total_us <= stalls.some.total_us


def test_a_trigger_without_psi_is_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        open_trigger(tmp_path / "memory", "some", stall_us=1, window_us=2)
    assert caught.value.errno == errno.ENOENT


def test_a_trigger_is_one_write_with_a_byte_to_spare(tmp_path: Path) -> None:
    """The kernel overwrites the last byte, so it must not be part of the window."""
    path = tmp_path / "memory"
    path.touch()
    os.close(open_trigger(path, "full", stall_us=150_000, window_us=1_000_000))
    assert path.read_bytes() == b"full 150000 1000000\0"
