"""Demand from readings."""

from __future__ import annotations

import pytest

from ballast.guest.memory.demand import demand_parts


@pytest.mark.parametrize(("available_bytes", "demand_bytes"), [(1000, 0), (0, 1000), (250, 750), (2000, 0)])
def test_demand_is_what_the_kernel_could_not_give_away(available_bytes: int, demand_bytes: int) -> None:
    """Never negative: MemAvailable is an estimate."""
    assert demand_parts(total_bytes=1000, available_bytes=available_bytes) == {"unreclaimable": demand_bytes}
