"""A short run of the fault campaign (`make faults` is the long one): whatever dies, everything thaws in time."""

from __future__ import annotations

import pytest

from tests.lab.guest import Guest
from tests.vm.faults import KINDS, prepare, run_round

ROUNDS = 2


@pytest.fixture(scope="module", autouse=True)
def _witness(guest: Guest) -> None:
    prepare(guest)


@pytest.mark.parametrize("kind", KINDS)
def test_everything_thaws_whatever_dies(guest: Guest, kind: str) -> None:
    for _ in range(ROUNDS):
        run_round(guest, kind)
