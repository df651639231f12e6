"""A short run of the benchmark: that it measures. What it must show is for `make bench` to say, on a quiet machine."""

from __future__ import annotations

from collections.abc import Callable

from tests.lab.guest import Guest
from tests.vm.bench import time_case
from tests.vm.bench_figures import compare

PAIRS = 2


def test_both_agents_freeze_four_file_systems_under_buffered_writes(
    guest: Guest, measured: Callable[[str], None]
) -> None:
    (case,) = compare(list(time_case(guest, 4, "buffered", PAIRS)))
    measured(f"longest write gap, four file systems under buffered writes, Ballast and qemu-ga: {case.gap}")
    assert case.pairs == PAIRS
    assert case.gap.ratio > 0
