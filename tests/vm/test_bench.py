"""A short run of the benchmark (`make bench` is the long one): writers stand still for less time than with qemu-ga."""

from __future__ import annotations

from collections.abc import Callable

from tests.lab.guest import Guest
from tests.vm.bench import time_case
from tests.vm.bench_figures import compare

PAIRS = 2


def test_writers_of_four_file_systems_stand_still_for_less_time(guest: Guest, measured: Callable[[str], None]) -> None:
    (case,) = compare(list(time_case(guest, 4, "buffered", PAIRS)))
    measured(f"longest write gap, four file systems under buffered writes, Ballast and qemu-ga: {case.gap}")
    assert case.pairs == PAIRS
    assert case.gap.ratio < 1  # 0.2 is what `make bench` asks for, of fifteen pairs on a quiet machine
