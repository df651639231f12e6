"""A short run of the balloon's fault campaign (`make balloon-faults` is the long one): no page of the guest's is lost.

In a guest of its own, small, so that whatever comes free is soon somebody else's.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ballast.host import linux
from tests.lab.guest import Guest
from tests.vm.balloon_faults import KINDS, RoundFailed, boot, run_round

MUTANT_ROUNDS = 6


@pytest.fixture(scope="module")
def small_guest() -> Iterator[Guest]:
    with boot() as guest:
        yield guest


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "reset"])
@pytest.mark.parametrize("number", [0, 1], ids=["careful", "careless"])
def test_between_answer_and_hole_nothing_is_lost(small_guest: Guest, kind: str, number: int) -> None:
    run_round(small_guest, kind, number)


def test_a_guest_that_begins_anew_loses_nothing(small_guest: Guest) -> None:
    """The worst of them: the hole comes when all memory is in use again, from a host that noticed nothing."""
    run_round(small_guest, "reset", 1)


def test_without_the_look_for_zeros_pages_are_lost(small_guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The campaign can fail: by the checker's pages, or by a guest that dies of others. The last test in its guest."""
    monkeypatch.setattr(linux, "is_zero", lambda *_: True)
    with pytest.raises(RoundFailed):
        run_rounds(small_guest, "both-killed", MUTANT_ROUNDS)


def run_rounds(guest: Guest, kind: str, count: int) -> None:
    """Until one fails."""
    for _ in range(count):
        run_round(guest, kind, 1)
