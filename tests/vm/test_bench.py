"""Short runs of the benchmarks: that they measure. What they must show, `make bench` says, on a quiet machine."""

from __future__ import annotations

from collections.abc import Callable

from tests.lab.guest import Guest
from tests.vm.bench import time_case
from tests.vm.bench_figures import compare
from tests.vm.bench_machine import boot
from tests.vm.bench_memory import run_pair
from tests.vm.bench_memory_figures import VIRTIO_BALLOON
from tests.vm.bench_memory_figures import compare as compare_memory

PAIRS = 1
MEMORY_BYTES = 3 << 29


def test_both_agents_freeze_four_file_systems_under_buffered_writes(
    guest: Guest, measured: Callable[[str], None]
) -> None:
    (case,) = compare(list(time_case(guest, 4, "buffered", PAIRS)))
    measured(f"longest write gap, four file systems under buffered writes, Ballast and qemu-ga: {case.gap}")
    assert case.pairs == PAIRS
    assert case.gap.ratio > 0


def test_memory_is_taken_and_given_by_everybody(measured: Callable[[str], None]) -> None:
    with boot(MEMORY_BYTES) as machine:
        lines = run_pair(machine, "hot", 1, without=VIRTIO_BALLOON) + run_pair(machine, "boot", 1)
    comparisons = compare_memory(lines)
    for comparison in comparisons:
        measured(f"{comparison.measure}, Ballast and {comparison.peer}: {comparison.time}")
    measures = ["reclaim-hot", "return-hot", "reclaim-boot", "reclaim-boot-first", "return-boot"]
    assert [one.measure for one in comparisons] == measures
    for line in lines:
        if line["measure"].startswith("reclaim") and line["contender"] == "ballast":
            before_mib, after_mib = line["host_mib"]
            assert before_mib - after_mib > 0.75 * line["mib"]  # a few pages were never the host's to give
