"""Demand from readings: the law, then what real guests showed."""

from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ballast.guest.linux.meminfo import parse_meminfo
from ballast.guest.linux.tree import Tree
from ballast.guest.linux.vmstat import Vmstat, parse_vmstat
from ballast.guest.memory.demand import (
    HOT_HALF_LIFE_S,
    Learnt,
    Reading,
    demand_parts,
    learn,
    promised_bytes,
    read_demand,
    swapped_bytes,
)
from ballast.guest.memory.floor import floor_bytes
from tests.unit.guest.linux.test_meminfo import REAL

MIB = 1 << 20
PAGE = 4096
NOW = Reading(
    at_s=1000.0,
    usable_bytes=4096 * MIB,
    unreclaimable_bytes=1000 * MIB,
    swapped_bytes=0,
    cache_bytes=1000 * MIB,
    refaulted_bytes=500 * MIB,
    promised_bytes=0,
)
EMPTY = parse_meminfo(REAL)
QUIET = Vmstat(0, 0, 0, 0, 0)


def later(seconds: float, before: Reading = NOW, **changed: int) -> Reading:
    return dataclasses.replace(before, at_s=before.at_s + seconds, **changed)


def parts(now: Reading, learnt: Learnt | None = None, stalled_percent: float = 0.0) -> dict[str, int]:
    """Those that are not 0, in MiB."""
    told = demand_parts(now, learnt or learn(None, now), stalled_percent=stalled_percent)
    return {name: round(bytes_ / MIB) for name, bytes_ in told.items() if round(bytes_ / MIB)}


def test_parts_are_whole_bytes_with_names_that_stay() -> None:
    told = demand_parts(NOW, learn(None, NOW), stalled_percent=3)
    assert list(told) == ["unreclaimable", "swapped", "lately", "hot-cache", "promised", "floor", "pressure"]
    assert {type(bytes_) for bytes_ in told.values()} == {int}


def test_at_the_first_reading_it_is_what_is_held_now() -> None:
    """Whatever was refaulted since boot."""
    assert learn(None, NOW) == Learnt(1000.0, 1000 * MIB, 1000 * MIB, 0, 500 * MIB)
    assert parts(NOW) == {"unreclaimable": 1000}


def test_it_follows_a_burst_at_once_and_remembers_it_for_a_while() -> None:
    before = learn(None, NOW)
    burst = later(1, unreclaimable_bytes=2000 * MIB)
    learnt = learn(before, burst)
    assert parts(burst, learnt) == {"unreclaimable": 2000}
    over = later(1, burst, unreclaimable_bytes=1000 * MIB)
    learnt = learn(learnt, over)
    # 1000 * (1 - exp(-1/5)) of it in the fast average, a second later exp(-1/5) of that.
    assert parts(over, learnt) == {"unreclaimable": 1000, "lately": round(1000 * (1 - math.exp(-0.2)) * math.exp(-0.2))}
    for seconds, lately in ((10, 20), (10, 12), (60, 4), (600, 0)):
        over = later(seconds, over)
        learnt = learn(learnt, over)
        assert parts(over, learnt).get("lately", 0) == lately


@given(steps=st.lists(st.floats(0.001, 100), min_size=1, max_size=50))
def test_how_often_somebody_reads_makes_no_difference(steps: list[float]) -> None:
    """While nothing changes but the time: what is remembered and what is hot fade by the clock alone."""
    start = Learnt(1000.0, 3000.0 * MIB, 2000.0 * MIB, 900.0 * MIB, 500 * MIB)
    at_once = learn(start, later(sum(steps)))
    learnt, now = start, NOW
    for seconds in steps:
        now = later(seconds, now)
        learnt = learn(learnt, now)
    assert dataclasses.astuple(learnt) == pytest.approx(dataclasses.astuple(at_once), rel=1e-6)


@given(count=st.integers(1, 100))
def test_refaults_that_come_evenly_are_counted_alike_by_who_reads_once_or_often(count: int) -> None:
    start = learn(None, NOW)
    at_once = learn(start, later(100, refaulted_bytes=600 * MIB))
    learnt = start
    for number in range(1, count + 1):
        refaulted_bytes = NOW.refaulted_bytes + round(100 * MIB * number / count)
        learnt = learn(learnt, later(100 * number / count, refaulted_bytes=refaulted_bytes))
    assert learnt.hot_bytes == pytest.approx(at_once.hot_bytes, rel=1e-4)


def test_hot_cache_is_learnt_from_refaults_and_half_forgotten_after_three_minutes() -> None:
    refaulted = later(0, refaulted_bytes=600 * MIB)
    learnt = learn(learn(None, NOW), refaulted)
    assert parts(refaulted, learnt) == {"unreclaimable": 1000, "hot-cache": 100}
    half = later(HOT_HALF_LIFE_S, refaulted)
    assert parts(half, learn(learnt, half)) == {"unreclaimable": 1000, "hot-cache": 50}


def test_hot_cache_is_no_more_than_there_is_cache() -> None:
    refaulted = later(1, refaulted_bytes=5000 * MIB)
    assert parts(refaulted, learn(learn(None, NOW), refaulted))["hot-cache"] == 1000
    small = later(1, refaulted_bytes=5000 * MIB, cache_bytes=10 * MIB)
    assert parts(small, learn(learn(None, NOW), small))["hot-cache"] == 10


def test_after_a_long_gap_it_is_what_is_held_at_its_end() -> None:
    learnt = learn(Learnt(0.0, 4000.0 * MIB, 4000.0 * MIB, 1000.0 * MIB, 0), NOW)
    assert parts(NOW, learnt) == {"unreclaimable": 1000, "hot-cache": 148}


def test_a_clock_or_a_counter_that_went_back_does_no_harm() -> None:
    before = learn(None, NOW)
    assert learn(before, later(-5, refaulted_bytes=0)).hot_bytes == 0


@pytest.mark.parametrize(
    ("promised_mib", "expected_mib"), [(0, 0), (1000, 0), (1200, 100), (3000, 1000), (3048, 1024), (100_000, 1024)]
)
def test_half_of_what_was_promised_beyond_counts_and_a_quarter_of_memory_at_most(
    promised_mib: int, expected_mib: int
) -> None:
    assert parts(later(0, promised_bytes=promised_mib * MIB)).get("promised", 0) == expected_mib


def test_what_is_swapped_out_is_held_as_much_as_what_is_not() -> None:
    """A guest that swaps looks healthier by MemAvailable alone."""
    learnt = learn(None, NOW)
    swapping = later(5, unreclaimable_bytes=600 * MIB, swapped_bytes=400 * MIB)
    assert parts(swapping, learn(learnt, swapping)) == {"unreclaimable": 600, "swapped": 400}


@pytest.mark.parametrize(("stalled_percent", "pressure_mib"), [(0, 0), (-1, 0), (1, 50), (5, 250), (100, 250)])
def test_stalls_add_a_quarter_at_most(stalled_percent: float, pressure_mib: int) -> None:
    assert parts(NOW, stalled_percent=stalled_percent).get("pressure", 0) == pressure_mib


def test_it_is_never_less_than_the_floor() -> None:
    idle = later(0, unreclaimable_bytes=100 * MIB)
    told = demand_parts(idle, learn(None, idle), stalled_percent=0)
    assert sum(told.values()) == floor_bytes(idle.usable_bytes)
    assert told["floor"] == floor_bytes(idle.usable_bytes) - 100 * MIB


@given(
    reading=st.builds(
        Reading,
        at_s=st.floats(0, 1e9),
        **dict.fromkeys(
            (
                "usable_bytes",
                "unreclaimable_bytes",
                "swapped_bytes",
                "cache_bytes",
                "refaulted_bytes",
                "promised_bytes",
            ),
            st.integers(0, 2**50),
        ),
    ),
    before=st.builds(
        Learnt,
        at_s=st.floats(0, 1e9),
        fast_bytes=st.floats(0, 2**50),
        slow_bytes=st.floats(0, 2**50),
        hot_bytes=st.floats(0, 2**50),
        refaulted_bytes=st.integers(0, 2**50),
    ),
    stalled_percent=st.floats(0, 100),
)
def test_no_part_is_ever_negative(reading: Reading, before: Learnt, stalled_percent: float) -> None:
    told = demand_parts(reading, learn(before, reading), stalled_percent=stalled_percent)
    assert min(told.values()) >= 0
    assert sum(told.values()) >= reading.held_bytes


def test_the_balloon_is_no_need_of_the_guests() -> None:
    memory = dataclasses.replace(EMPTY, total_bytes=1000, available_bytes=100, committed_bytes=2000)
    now = read_demand(memory, QUIET, at_s=0.0, balloon_bytes=600, overcommit=0, page_bytes=PAGE)
    assert (now.usable_bytes, now.unreclaimable_bytes, now.promised_bytes) == (400, 300, 2000)


def test_available_memory_beyond_the_total_is_no_negative_need() -> None:
    """MemAvailable is an estimate, and a chunk of the balloon may be on its way back."""
    memory = dataclasses.replace(EMPTY, total_bytes=1000, available_bytes=700)
    now = read_demand(memory, QUIET, at_s=0.0, balloon_bytes=600, overcommit=0, page_bytes=PAGE)
    assert now.unreclaimable_bytes == 0


@pytest.mark.parametrize(("overcommit", "expected"), [(0, 1000), (1, 1000), (2, 400)])
def test_the_balloon_is_promised_only_where_nothing_is_overcommitted(overcommit: int, expected: int) -> None:
    memory = dataclasses.replace(EMPTY, committed_bytes=1000)
    assert promised_bytes(memory, 600, overcommit) == expected


@pytest.mark.parametrize(
    ("cached", "zswap", "compressed", "expected"),
    [(0, 0, 0, 600), (100, 0, 0, 500), (0, 200, 0, 400), (0, 200, 250, 350), (100, 0, 700, 0)],
)
def test_what_is_in_memory_too_is_not_swapped_out(cached: int, zswap: int, compressed: int, expected: int) -> None:
    memory = dataclasses.replace(
        EMPTY, swap_total_bytes=1000, swap_free_bytes=400, swap_cached_bytes=cached, zswap_bytes=zswap
    )
    assert swapped_bytes(memory, compressed) == expected


def test_recorded(recorded: Tree) -> None:
    """A guest that was just booted: what the kernel holds, some promises, and no less than the floor."""
    memory = parse_meminfo(recorded.read("proc/meminfo"))
    counters = parse_vmstat(recorded.read("proc/vmstat"))
    now = read_demand(memory, counters, at_s=0.0, balloon_bytes=0, overcommit=0, page_bytes=PAGE)
    assert now.usable_bytes - now.unreclaimable_bytes == memory.available_bytes
    told = demand_parts(now, learn(None, now), stalled_percent=0)
    assert sum(told.values()) == floor_bytes(memory.total_bytes)
    assert told["swapped"] == told["lately"] == told["hot-cache"] == told["pressure"] == 0
