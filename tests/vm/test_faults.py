"""A short run of the fault campaign (`make faults` is the long one): whatever goes wrong, all is well again in time."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import pytest

from tests.lab.guest import Guest
from tests.vm.conftest import DIST
from tests.vm.fault_kinds import KINDS
from tests.vm.fault_round import clear, prepare, run_round
from tests.vm.package import bring


@pytest.fixture(scope="module", autouse=True)
def _prepared(guest: Guest) -> Iterator[None]:
    prepare(guest)
    yield
    clear(guest)
    bring(guest, DIST)


@pytest.mark.parametrize("kind", KINDS)
def test_all_is_well_whatever_goes_wrong(guest: Guest, kind: str, measured: Callable[[str], None]) -> None:
    figures = run_round(guest, kind, random.Random(kind))
    measured(f"{kind}: thawed {figures['worst_s']:.2f} s after the harm")
