"""The balloon of a guest whose memory lies on both sides of 4 GiB: rounds of balloon_rounds and of balloon_trials.

The third of them is test_balloon's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from unittest import mock

import pytest

from ballast.host import linux
from ballast.host.qemu import Qemu
from ballast.host.reclaim import release
from tests.lab.guest import Guest
from tests.vm.balloon_faults import order
from tests.vm.balloon_rounds import run_round
from tests.vm.balloon_trials import run_forged, run_pins
from tests.vm.parted import DROP_ALL, LEFT_MIB, PAGE_BYTES, boot, held_page

FORGED = 2000


@pytest.fixture(scope="module")
def parted() -> Iterator[Guest]:
    """A guest of its own."""
    with boot("trixie") as guest:
        yield guest


@pytest.mark.parametrize("number", range(3))
def test_in_and_out(parted: Guest, measured: Callable[[str], None], number: int) -> None:
    """A short run of balloon_rounds (`make balloon-rounds` is the long one). First, while there is no DIMM."""
    measured(f"the balloon in and out: {run_round(parted, 1, number)}")


async def test_frames_of_the_balloon_stay_where_they_are(parted: Guest, measured: Callable[[str], None]) -> None:
    measured(f"the balloon's frames: {await run_pins(parted)}")


async def test_forged_answers_lose_nothing(parted: Guest, measured: Callable[[str], None]) -> None:
    measured(f"forged answers: {await run_forged(parted, FORGED)}")


async def test_a_lost_page_would_be_seen(parted: Guest) -> None:
    """Last, since it does what must never happen: without the look for zeros, one page of the checker's."""
    order(parted, f"grab {LEFT_MIB}")
    page = held_page(parted)
    async with Qemu.connect(str(parted.qmp_path), ["vsock"]) as machine:
        pieces = (await machine.memory()).locate([[page, PAGE_BYTES]])
        assert release(pieces).not_zero_bytes == PAGE_BYTES
        assert order(parted, "check")["bad"] == []
        with mock.patch.object(linux, "is_zero", return_value=True):
            assert release(pieces).punched_bytes == PAGE_BYTES
    ((_, lost, first_bytes),) = order(parted, "check")["bad"]
    assert (lost, first_bytes) == (page, bytes(16).hex())
    order(parted, DROP_ALL)
