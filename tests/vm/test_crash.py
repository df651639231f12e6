"""A short run of the crash-consistency campaign (`make crash` is the long one), and that it can fail."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from tests.lab.guest import Guest
from tests.vm.crash import LAYOUTS, check, checker, judge, take
from tests.vm.crash_loaded import loaded

CYCLES = 3


@pytest.mark.timeout(600)
def test_snapshots_lose_nothing_that_was_acknowledged_unless_nothing_was_frozen(
    guest: Guest, measured: Callable[[str], None]
) -> None:
    dice = random.Random(0)
    # The fresh guest first, so that it boots beside all else.
    with checker() as fresh, loaded(guest) as load:
        load.begin(LAYOUTS[0])
        frozen = [take(load, dice) for _ in range(CYCLES)]
        unfrozen = take(load, dice, is_frozen=False)
        load.wait_progress()
        with load.paused():
            fresh.wait_boot()
            found = [check(fresh, snapshot, load) for snapshot in (*frozen, unfrozen)]
    assert [judge(*one) for one in zip(frozen, found[:CYCLES], strict=True)] == [[]] * CYCLES
    # As frozen the deleted file is still there, and the checkers do find fault with that.
    assert all(disks[name]["before"] for disks in found[:CYCLES] for name in ("data0", "data1"))
    lost = judge(unfrozen, found[CYCLES])
    assert any(" lost, " in text for text in lost)
    measured(f"without a freeze a snapshot misses: {'; '.join(text.partition(',')[0] for text in lost)}")
