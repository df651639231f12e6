"""The pressure level as a state. That the kernel's triggers raise it is shown in guests."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest

from ballast.guest.config import Pressure as Settings
from ballast.guest.events import Events
from ballast.guest.linux.psi import PRESSURE_FILE
from ballast.guest.linux.tree import Tree
from ballast.guest.memory.groups import ROOT
from ballast.guest.memory.level import PressureLevel
from ballast.wire.memory_names import Level, StallKind
from tests.unit.guest.conftest import MakeTree

DEADLINE_S = 10


def figures(some: float, full: float) -> str:
    """A pressure file with those ten-second averages."""
    lines = (
        f"{kind} avg10={avg10} avg60=0.00 avg300=0.00 total=5\n" for kind, avg10 in (("some", some), ("full", full))
    )
    return "".join(lines)


def group(name: str, some: float, full: float) -> dict[str, str]:
    return {f"{ROOT}/{name}/memory.pressure": figures(some, full)}


class Followed:
    """A level over averages that the test sets, with a clock that the test turns."""

    def __init__(self, make_tree: MakeTree, settings: Settings) -> None:
        self._make_tree = make_tree
        self.now_s = 0.0
        self.changes: asyncio.Queue[Level] = asyncio.Queue()
        self.events = Events()
        self.level = PressureLevel(make_tree({}), settings, self.changes.put_nowait, clock=lambda: self.now_s)

    def average(self, some: float, full: float, name: str = "system.slice") -> None:
        self._make_tree(group(name, some, full))

    def look(self, after_s: float = 0.0) -> Level:
        self.now_s += after_s
        return self.level.look().level

    async def next(self) -> Level:
        async with asyncio.timeout(DEADLINE_S):
            return await self.changes.get()


@pytest.fixture
def settings() -> Settings:
    return Settings()


@pytest.fixture
def followed(make_tree: MakeTree, settings: Settings) -> Followed:
    return Followed(make_tree, settings)


@pytest.fixture
async def running(followed: Followed) -> AsyncIterator[Followed]:
    """One that looks again every millisecond, by the loop's clock."""
    followed.level._window_s = 0.001
    task = asyncio.create_task(followed.level.run(followed.events))
    await asyncio.sleep(0)
    yield followed
    assert not task.done()
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


@pytest.mark.parametrize(
    ("some", "full", "level"),
    [
        (0.0, 0.0, "low"),
        (9.99, 9.99, "low"),
        (10.0, 0.0, "medium"),
        (99.0, 9.99, "medium"),
        (10.0, 10.0, "critical"),
        (100.0, 100.0, "critical"),
    ],
)
def test_averages_raise_it_at_a_reading(followed: Followed, some: float, full: float, level: str) -> None:
    followed.average(some, full)
    assert followed.look() == followed.level.now == level


@pytest.mark.parametrize(
    ("settings", "some", "full", "level"),
    [
        (Settings(medium_percent=50), 49.9, 9.9, "low"),
        (Settings(medium_percent=50), 50.0, 0.0, "medium"),
        (Settings(medium_percent=50, critical_percent=1), 1.0, 1.0, "critical"),
        (Settings(critical_percent=100), 99.9, 99.9, "medium"),
    ],
)
def test_thresholds_are_configurable(followed: Followed, some: float, full: float, level: str) -> None:
    followed.average(some, full)
    assert followed.look() == level


def test_a_level_is_left_only_below_a_part_of_what_it_takes_to_get_there(followed: Followed) -> None:
    steps: list[tuple[float, float, Level]] = [
        (9.9, 9.9, "low"),
        (10, 10, "critical"),
        (10, 5, "critical"),
        (9.9, 4.9, "medium"),
        (9.9, 9.9, "medium"),  # and critical has to be reached anew
        (5, 0, "medium"),
        (4.9, 4.9, "low"),
        (9.9, 0, "low"),
    ]
    for some, full, level in steps:
        followed.average(some, full)
        assert followed.look(60) == level


@pytest.mark.parametrize("settings", [Settings(ease_percent=100)])
def test_without_hysteresis_a_level_is_left_where_it_was_reached(followed: Followed) -> None:
    followed.average(10, 10)
    assert followed.look() == "critical"
    followed.average(9.9, 9.9)
    assert followed.look() == "low"


def test_a_trigger_raises_it_at_once_and_holds_it_for_two_windows_though_the_averages_lag(followed: Followed) -> None:
    heard: list[StallKind] = ["some", "full", "some"]
    for kind in heard:
        followed.level.hear(kind)
    assert [followed.changes.get_nowait() for _ in range(2)] == ["medium", "critical"]
    assert followed.changes.empty()
    followed.average(0, 0)
    assert followed.look(1.9) == "critical"
    followed.level.hear("some")
    assert followed.look(0.1) == "medium"
    assert followed.look(1.9) == "low"


@pytest.mark.parametrize("settings", [Settings(window_ms=10_000)])
def test_it_is_held_for_windows_as_long_as_configured(followed: Followed) -> None:
    followed.level.hear("full")
    assert followed.look(19.9) == "critical"
    assert followed.look(0.1) == "low"


def test_the_worst_group_counts_and_ours_does_not(followed: Followed) -> None:
    followed.average(0, 0)
    followed.average(99, 99, "ballast.slice")
    followed.average(12, 0, "user.slice")
    look = followed.level.look()
    assert (look.level, look.source, look.some_percent) == ("medium", "slices", 12)
    assert set(look.groups) == {"system.slice", "user.slice"}


def test_pid_1_alone_is_not_everybody(followed: Followed) -> None:
    followed.average(50, 50, "init.scope")
    assert followed.look() == "medium"


@pytest.mark.parametrize("settings", [Settings(cgroups=("system.slice/db.service",))])
def test_a_chosen_group_counts_by_itself(followed: Followed) -> None:
    followed.average(15, 3)
    assert followed.look() == "medium"
    followed.average(15, 15, "system.slice/db.service")
    assert followed.look() == "critical"


def test_the_system_wide_figure_is_told_and_counts_only_where_no_group_is_measured(
    make_tree: MakeTree, followed: Followed
) -> None:
    make_tree({PRESSURE_FILE: figures(50, 50)})
    assert (followed.level.look().source, followed.level.now) == ("system", "critical")
    followed.average(0, 0)
    look = followed.level.look()
    assert (look.level, look.source) == ("low", "slices")
    assert look.system is not None
    assert look.system.some.avg10 == 50


def test_with_the_system_wide_figure_our_own_inflating_does_not_raise_it(
    make_tree: MakeTree, followed: Followed, running: Followed
) -> None:
    followed.level._window_s = 1.0
    make_tree({PRESSURE_FILE: figures(50, 50)})
    followed.events.publish("BALLAST_BALLOON", {"cause": "inflate", "total-bytes": 1})
    assert followed.look() == "low"
    followed.events.publish("BALLAST_BALLOON", {"cause": "deflate", "total-bytes": 0})
    assert followed.look(1.0) == "critical"


def test_without_psi_it_goes_by_counters_and_says_so(make_tree: MakeTree, followed: Followed) -> None:
    text = "workingset_refault_anon 0\nworkingset_refault_file {}\nallocstall_normal 0\n"
    expected = {0: "low", 999: "low", 1_999: "medium", 2_500: "medium", 12_500: "critical", 12_900: "low"}
    for refaults, level in expected.items():
        make_tree({"proc/vmstat": text.format(refaults)})
        look = followed.level.look()
        assert (look.level, look.source, look.system, look.groups) == (level, "vmstat", None, {})
        followed.now_s += 1


def test_without_anything_to_read_it_is_low(followed: Followed) -> None:
    assert (followed.look(), followed.look(1)) == ("low", "low")


def test_what_a_trigger_has_told_is_in_the_share_before_the_average_is(followed: Followed) -> None:
    followed.average(1, 0)
    assert followed.level.look().some_percent == 1
    followed.level.hear("some")
    assert followed.level.look().some_percent == 10


@pytest.mark.parametrize(
    ("kind", "percent", "level"),
    [("some", 9.9, "low"), ("some", 100, "medium"), ("full", 9.9, "low"), ("full", 10, "critical")],
)
def test_a_share_by_itself(followed: Followed, kind: StallKind, percent: float, level: Level) -> None:
    assert followed.level.level_of(kind, percent) == level


async def test_it_comes_down_by_itself_and_then_no_timer_is_left(running: Followed) -> None:
    running.average(50, 50)
    running.level.hear("full")
    assert await running.next() == "critical"
    running.now_s += 60
    running.average(50, 0)
    assert await running.next() == "medium"
    running.average(0, 0)
    assert await running.next() == "low"
    await asyncio.sleep(0)
    loop = asyncio.get_running_loop()
    assert not [timer for timer in loop._scheduled if not timer.cancelled()]  # type: ignore[attr-defined]


async def test_a_reading_that_raised_it_makes_it_come_down_as_well(running: Followed) -> None:
    running.average(50, 0)
    assert running.look() == await running.next() == "medium"
    running.average(0, 0)
    assert await running.next() == "low"


def test_recorded(recorded: Tree) -> None:
    """The older recording has no control groups in it."""
    look = PressureLevel(recorded).look()
    assert (look.level, look.system is None) == ("low", False)
    assert look.source == ("slices" if recorded.exists(f"{ROOT}/cgroup.controllers") else "system")
    assert set(look.groups) <= {"init.scope", "system.slice"}
