"""The pressure level as a state. That the kernel's triggers raise it is shown in guests."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest

from ballast.guest.memory.level import PressureLevel
from ballast.guest.memory.pressure import Pressure
from ballast.wire.memory_names import Level
from ballast.wire.message import Event
from tests.unit.guest.conftest import MakeTree
from tests.unit.guest.memory.test_pressure import pressure_file

DEADLINE_S = 10


class Followed:
    """A level that is followed, over averages that the test sets."""

    def __init__(self, make_tree: MakeTree) -> None:
        self._make_tree = make_tree
        self._pressure = Pressure(make_tree({}), max_triggers=1)
        self.changes: asyncio.Queue[Level] = asyncio.Queue()
        self.level = PressureLevel(self._pressure, self.changes.put_nowait, look_again_s=0.001)

    def average(self, some: float, full: float) -> None:
        self._make_tree(pressure_file(some, full))

    def hear(self, level: Level) -> None:
        assert self.level.hear(Event("BALLAST_PRESSURE", {"level": level}, 1, 0))

    async def next(self) -> Level:
        async with asyncio.timeout(DEADLINE_S):
            return await self.changes.get()


@pytest.fixture
async def followed(make_tree: MakeTree) -> AsyncIterator[Followed]:
    followed = Followed(make_tree)
    task = asyncio.create_task(followed.level.run())
    await asyncio.sleep(0)  # no PSI there yet: nothing is armed, and nobody minds
    yield followed
    assert not task.done()
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


async def test_it_rises_at_once_and_falls_with_the_averages(followed: Followed) -> None:
    followed.average(50, 20)
    followed.hear("medium")
    followed.hear("critical")
    assert [followed.changes.get_nowait() for _ in range(2)] == ["medium", "critical"]
    followed.average(50, 9)
    assert await followed.next() == "medium"
    followed.average(9, 0)
    assert await followed.next() == "low"
    followed.hear("critical")
    assert [await followed.next() for _ in range(2)] == ["critical", "low"]


async def test_a_lower_event_does_not_lower_it(followed: Followed) -> None:
    followed.average(50, 20)
    for level in ("critical", "medium", "critical", "medium"):
        followed.hear(level)
    await asyncio.sleep(0.02)  # some looks
    followed.hear("medium")
    assert followed.changes.get_nowait() == "critical"
    assert followed.changes.empty()


async def test_what_is_heard_between_two_looks_holds_it_though_the_averages_lag(followed: Followed) -> None:
    followed.average(0, 0)
    for _ in range(50):
        followed.hear("critical")
        await asyncio.sleep(0)
    assert await followed.next() == "critical"
    assert await followed.next() == "low"


async def test_no_timer_runs_while_it_is_low(followed: Followed) -> None:
    followed.hear("medium")
    assert [await followed.next() for _ in range(2)] == ["medium", "low"]
    await asyncio.sleep(0)
    loop = asyncio.get_running_loop()
    assert not [timer for timer in loop._scheduled if not timer.cancelled()]  # type: ignore[attr-defined]
