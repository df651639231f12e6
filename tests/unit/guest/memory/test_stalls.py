"""Stalls estimated from counters, on a clock of the test's."""

from __future__ import annotations

import pytest

from ballast.guest.memory.stalls import LEAST_S, StallRates
from tests.unit.guest.conftest import MakeTree


class Guest:
    """Counters that the test sets, and a clock."""

    def __init__(self, make_tree: MakeTree) -> None:
        self._make_tree = make_tree
        self.now_s = 1000.0
        self.rates = StallRates(lambda: self.now_s)

    def read(self, after_s: float, *, refaults: int = 0, stalls: int = 0) -> tuple[float, float]:
        self.now_s += after_s
        text = f"workingset_refault_anon 0\nworkingset_refault_file {refaults}\nallocstall_normal {stalls}\n"
        return self.rates.read(self._make_tree({"proc/vmstat": text}))


@pytest.fixture
def guest(make_tree: MakeTree) -> Guest:
    return Guest(make_tree)


def test_the_first_reading_says_nothing_about_what_was_counted_since_boot(guest: Guest) -> None:
    assert guest.read(0, refaults=10**9, stalls=10**9) == (0, 0)


@pytest.mark.parametrize(
    ("refaults", "stalls", "some", "full"),
    [(0, 0, 0, 0), (1_000, 0, 10, 1), (0, 100, 10, 1), (500, 50, 10, 1), (10_000, 0, 100, 10), (10**7, 0, 100, 100)],
)
def test_counts_of_a_second_become_shares_of_it(
    guest: Guest, refaults: int, stalls: int, some: float, full: float
) -> None:
    guest.read(0)
    assert guest.read(1, refaults=refaults, stalls=stalls) == pytest.approx((some, full))


def test_over_a_long_gap_it_is_the_average(guest: Guest) -> None:
    guest.read(0)
    assert guest.read(100, refaults=10_000) == pytest.approx((1, 0.1))


def test_readings_close_together_are_told_the_same_and_lose_nothing(guest: Guest) -> None:
    guest.read(0)
    assert guest.read(LEAST_S / 2, refaults=1_000_000) == (0, 0)
    assert guest.read(1 - LEAST_S / 2, refaults=1_000) == pytest.approx((10, 1))
    assert guest.read(0.001, refaults=2_000) == pytest.approx((10, 1))


def test_where_nothing_can_be_read_it_stays_as_it_was(guest: Guest, make_tree: MakeTree) -> None:
    guest.read(0)
    before = guest.read(1, refaults=1_000)
    assert guest.rates.read(make_tree({"proc/vmstat": "garbage"})) == before
