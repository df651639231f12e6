"""What the lines of the memory benchmarks say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.vm import bench_idle
from tests.vm.bench_memory import read_lines
from tests.vm.bench_memory_figures import (
    BALLAST,
    KERNEL,
    UDEV,
    VIRTIO_BALLOON,
    VIRTIO_MEM,
    broken_bounds,
    compare,
    table,
)


def line(contender: str, pair: int, ms: float, measure: str = "reclaim-hot", **more: Any) -> dict[str, Any]:
    """One of the file of results."""
    return {"measure": measure, "contender": contender, "run": "r", "pair": pair, "ms": ms} | more


def test_ours_is_compared_with_each_peer_of_the_same_round() -> None:
    lines = [line(BALLAST, number, 100 + number, mib=1024, host_mib=[2000, 976]) for number in range(3)]
    lines += [line(VIRTIO_BALLOON, number, 2020, mib=1024, host_mib=[2000, 1000]) for number in range(3)]
    lines += [line(VIRTIO_MEM, 0, 200, mib=1024), line(VIRTIO_MEM, 9, 1.0, mib=1024)]
    balloon, virtio_mem = compare(lines)
    assert (balloon.peer, len(balloon.pairs), balloon.time.ratio) == (VIRTIO_BALLOON, 3, 0.05)
    assert (virtio_mem.peer, len(virtio_mem.pairs), virtio_mem.time.ratio) == (VIRTIO_MEM, 1, 0.5)
    told = table([balloon])
    assert "| virtio-balloon | 3 | 101 ms | 2020 ms | 0.05 (0.05 to 0.05) | 0.1 | 10139 | 507 |" in told
    assert "| 2000 to 976 MiB | 2000 to 1000 MiB |" in told


def test_rounds_of_several_runs_add_up_and_measures_are_told_in_their_order() -> None:
    lines = [line(name, 1, 9, "hotadd-8") for name in (KERNEL, UDEV, BALLAST)]
    lines += [line(name, 1, 9, "hotadd-8", run="s") for name in (KERNEL, UDEV, BALLAST)]
    lines += [line(name, 1, 9) for name in (BALLAST, VIRTIO_MEM)]
    found = [(one.measure, one.peer, len(one.pairs)) for one in compare(lines)]
    assert found == [("reclaim-hot", VIRTIO_MEM, 1), ("hotadd-8", KERNEL, 2), ("hotadd-8", UDEV, 2)]


def test_the_area_under_the_host_s_use_is_told_where_it_was_measured() -> None:
    lines = [line(name, 1, 9, "job", host_gib_min=0.25) for name in (BALLAST, VIRTIO_BALLOON)]
    assert "| 0.250 GiB min | 0.250 GiB min |" in table(compare(lines))


def test_a_broken_bound_is_told() -> None:
    lines = [line(BALLAST, 1, 50, "hotadd-64"), line(UDEV, 1, 100, "hotadd-64"), line(KERNEL, 1, 40, "hotadd-64")]
    (told,) = broken_bounds(compare(lines))
    assert told == "hot-add, first block seen to all online, 64 blocks: 1.25 times kernel's, not 1.1"


def test_results_of_another_commit_are_not_added_to(tmp_path: Path) -> None:
    results = tmp_path / "results.jsonl"
    assert read_lines(results, "c") == []
    results.write_text(json.dumps(line(BALLAST, 1, 1, commit="c", kernel="k")) + "\n")
    assert [one["ms"] for one in read_lines(results, "c")] == [1]
    with pytest.raises(SystemExit, match="has results of commit c, and this is d"):
        read_lines(results, "d")


def test_wake_ups_are_told_of_those_that_were_looked_at_while_nothing_happened() -> None:
    one = {"threads": 1, "wake-ups": 41, "cpu-ms": 12.3, "rss-bytes": 25 << 20, "pss-bytes": 20 << 20}
    names = ("ballastd", "qemu-ga", "ballast-guard")
    guest = {"suite": "trixie", "seconds": 600.0, "watchdog-wake-ups": 40}
    told = bench_idle.table([guest | {"processes": [one | {"name": name} for name in names]}]).splitlines()[2:]
    assert told == [
        "| trixie | ballastd | 1 | 600 s | 12 ms | 41 | 40 | 25.0 MiB | 20.0 MiB |",
        "| trixie | qemu-ga | 1 | 600 s | 12 ms | 41 |  | 25.0 MiB | 20.0 MiB |",
        "| trixie | ballast-guard | 1 |  |  |  |  | 25.0 MiB | 20.0 MiB |",
    ]
