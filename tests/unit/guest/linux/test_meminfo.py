"""/proc/meminfo: bad texts first, then real ones, then what later kernels may add."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ballast.guest.linux.meminfo import parse_meminfo
from ballast.guest.linux.tree import Tree

NAMES: tuple[str, ...] = (
    "MemTotal",
    "MemFree",
    "MemAvailable",
    "Cached",
    "SReclaimable",
    "SwapTotal",
    "SwapFree",
    "SwapCached",
)
NAMES += ("Committed_AS", "Active(anon)", "Inactive(anon)", "Active(file)", "Inactive(file)")
REAL = "".join(f"{name}:   {number} kB\n" for number, name in enumerate(NAMES, 1))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("line", ["", "{}: 7\n", "{}: -7 kB\n", "{}: 7 MB\n", "later{}: 7 kB\n"])
def test_without_a_line_it_is_a_value_error(name: str, line: str) -> None:
    text = "".join(line.format(name) if was.startswith(f"{name}:") else was for was in REAL.splitlines(keepends=True))
    with pytest.raises(ValueError, match="lacks the line"):
        parse_meminfo(text)


def test_sizes_are_bytes() -> None:
    memory = parse_meminfo(REAL)
    assert (memory.total_bytes, memory.free_bytes, memory.available_bytes) == (1 << 10, 2 << 10, 3 << 10)
    assert memory.cached_bytes == (4 + 5) << 10
    assert (memory.swap_total_bytes, memory.swap_free_bytes, memory.swap_cached_bytes) == (6 << 10, 7 << 10, 8 << 10)
    assert memory.committed_bytes == 9 << 10
    assert (memory.active_anon_bytes, memory.inactive_anon_bytes) == (10 << 10, 11 << 10)
    assert (memory.active_file_bytes, memory.inactive_file_bytes) == (12 << 10, 13 << 10)
    assert (memory.zswap_bytes, parse_meminfo(REAL + "Zswap:    7 kB\n").zswap_bytes) == (0, 7 << 10)


def test_what_later_kernels_add_is_passed_over() -> None:
    assert parse_meminfo(REAL + "HugePages_Total:       0\nActive(later):   7 kB\nnonsense\n") == parse_meminfo(REAL)


@given(st.text(alphabet="Mem: 01kB\n", max_size=80))
def test_nothing_but_value_error_comes_out_of_any_text(text: str) -> None:
    try:
        parse_meminfo(text)
    except ValueError:
        return


def test_recorded(recorded: Tree) -> None:
    memory = parse_meminfo(recorded.read("proc/meminfo"))
    assert 0 < memory.available_bytes < memory.total_bytes
