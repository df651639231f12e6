"""/proc/vmstat: bad texts first, then real ones, then what later kernels may add."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ballast.guest.linux.tree import Tree
from ballast.guest.linux.vmstat import Vmstat, parse_vmstat

REAL = """\
nr_zspages 3
workingset_refault_anon 5
workingset_refault_file 7
allocstall_dma32 11
allocstall_movable 13
pgscan_direct 17
pgscan_direct_throttle 1000
"""


@pytest.mark.parametrize("name", ["workingset_refault_anon", "workingset_refault_file"])
@pytest.mark.parametrize("line", ["", "{}\n", "{} -7\n", "{} 7.5\n", "later_{} 7\n", "{} 7 8\n"])
def test_without_refaults_it_is_a_value_error(name: str, line: str) -> None:
    text = "".join(line.format(name) if was.startswith(name) else was for was in REAL.splitlines(keepends=True))
    with pytest.raises(ValueError, match=f"lacks the line '{name}'"):
        parse_vmstat(text)


def test_stalls_of_all_zones_add_up() -> None:
    assert parse_vmstat(REAL) == Vmstat(5, 7, stalls=11 + 13, direct_scanned_pages=17, zspages=3)


def test_a_kernel_that_counts_no_events_says_so_by_their_absence() -> None:
    assert parse_vmstat("workingset_refault_anon 1\nworkingset_refault_file 2") == Vmstat(1, 2, None, None, 0)


def test_what_later_kernels_add_is_passed_over() -> None:
    assert parse_vmstat(REAL + "workingset_refault_other 9\npgscan_later 9\nnonsense\n") == parse_vmstat(REAL)


@given(st.text(alphabet="workingset_refault_file 01\n", max_size=80))
def test_nothing_but_value_error_comes_out_of_any_text(text: str) -> None:
    try:
        parse_vmstat(text)
    except ValueError:
        return


def test_recorded(recorded: Tree) -> None:
    """Guests that were just booted."""
    counts = parse_vmstat(recorded.read("proc/vmstat"))
    assert counts == Vmstat(0, 0, 0, 0, 0)
