"""Blocks that are leaving stay offline for a minute, over a restart too; what was not finished is over at once."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from ballast.guest.memory.leaving import LEAVING_S, Leaving


class Clock:
    """Seconds that a test sets."""

    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "leaving.json"


def test_a_minute_and_no_longer(path: Path, clock: Clock) -> None:
    leaving = Leaving(path, clock=clock)
    leaving.begin({32: "movable", 33: "kernel"})
    leaving.end([32, 33])
    clock.now_s += LEAVING_S - 1
    assert leaving.due() == {}
    clock.now_s += 1
    assert leaving.due() == {32: "movable", 33: "kernel"}
    leaving.forget([32])
    leaving.renew([33])
    assert (leaving.indexes(), leaving.due()) == ([33], {})


def test_what_is_under_way_has_no_end_and_is_not_forgotten(path: Path, clock: Clock) -> None:
    leaving = Leaving(path, clock=clock)
    leaving.begin({32: "movable", 33: "movable"})
    leaving.forget([32])
    clock.now_s += 10 * LEAVING_S
    assert (leaving.indexes(), leaving.due()) == ([32, 33], {})
    leaving.end([33])
    assert leaving.indexes() == [33]


def test_what_was_leaving_before_and_is_forgotten_meanwhile_stays_forgotten(path: Path, clock: Clock) -> None:
    leaving = Leaving(path, clock=clock)
    leaving.begin({32: "movable"})
    leaving.end([32])
    leaving.begin({33: "movable"})
    leaving.forget([32])
    leaving.end([33, 32])
    assert leaving.indexes() == [33]


@pytest.mark.parametrize("finished", [False, True])
def test_after_a_restart(path: Path, clock: Clock, *, finished: bool) -> None:
    first = Leaving(path, clock=clock)
    first.begin({32: "movable", 33: "kernel"})
    if finished:
        first.end([32, 33])
    second = Leaving(path, clock=clock)
    assert second.indexes() == [32, 33]
    assert second.due() == ({} if finished else {32: "movable", 33: "kernel"})
    clock.now_s += LEAVING_S
    assert second.due() == {32: "movable", 33: "kernel"}


@pytest.mark.parametrize(
    "text", ["", "garbage", "5", "[]", "{", '{"x": ["movable", 1]}', '{"1": 5}', '{"1": ["kernel"]}']
)
def test_a_spoiled_record_is_none(path: Path, text: str) -> None:
    path.write_text(text)
    leaving = Leaving(path)
    assert leaving.indexes() == []
    leaving.begin({32: "movable"})
    assert json.loads(path.read_text()) == {"32": ["movable", 0.0]}


def test_a_record_that_cannot_be_written_is_done_without(tmp_path: Path) -> None:
    leaving = Leaving(tmp_path / "absent" / "leaving.json")
    leaving.begin({32: "movable"})
    assert 32 in leaving


async def test_it_waits_for_the_next_that_is_due(path: Path, clock: Clock) -> None:
    leaving = Leaving(path, clock=clock)
    waiting = asyncio.create_task(leaving.wait_due())
    leaving.begin({32: "movable"})
    leaving.end([32])
    leaving.begin({33: "movable"})
    for _ in range(5):
        await asyncio.sleep(0)
    assert not waiting.done()
    clock.now_s += LEAVING_S
    leaving.end([33])
    async with asyncio.timeout(10):
        await waiting
    assert leaving.due() == {32: "movable"}
