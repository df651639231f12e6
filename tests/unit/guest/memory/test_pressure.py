"""Pressure without a kernel that presses: levels, and what a trigger may be. That triggers fire is shown in guests."""

from __future__ import annotations

import pytest

from ballast.guest.events import Subscription
from ballast.guest.linux.tree import Tree
from ballast.guest.memory.pressure import PRESSURE_FILE, Pressure, level_of
from ballast.wire.errors import BadRequest, Busy, KernelFailure, NotSupported
from ballast.wire.memory_names import PsiTrigger
from tests.unit.guest.conftest import MakeTree

NOBODY = Subscription(frozenset(), lambda _event: True)


def pressure_file(some: float, full: float) -> dict[str, str]:
    """A pressure file with those ten-second averages."""
    lines = (
        f"{kind} avg10={avg10} avg60=0.00 avg300=0.00 total=5\n" for kind, avg10 in (("some", some), ("full", full))
    )
    return {PRESSURE_FILE: "".join(lines)}


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
def test_levels(make_tree: MakeTree, some: float, full: float, level: str) -> None:
    assert level_of(some, full) == level
    assert Pressure(make_tree(pressure_file(some, full)), max_triggers=1).level() == level


@pytest.mark.parametrize("files", [{}, {PRESSURE_FILE: ""}, {PRESSURE_FILE: "garbage"}])
def test_without_psi_there_is_no_reading_and_no_level(make_tree: MakeTree, files: dict[str, str]) -> None:
    pressure = Pressure(make_tree(files), max_triggers=8)
    assert pressure.read() is None
    assert not pressure.is_available
    assert pressure.level() == "low"


@pytest.mark.parametrize("refused", [False, True])
def test_who_asks_for_the_default_triggers_just_hears_nothing_without_psi(
    make_tree: MakeTree, caplog: pytest.LogCaptureFixture, *, refused: bool
) -> None:
    tree = make_tree({})
    if refused:
        tree.path(PRESSURE_FILE).mkdir(parents=True)
    Pressure(tree, max_triggers=8).watch(None, NOBODY)()
    (line,) = caplog.messages
    assert line.startswith("no pressure events for a subscriber: ")


def test_recorded(recorded: Tree) -> None:
    pressure = Pressure(recorded, max_triggers=1)
    assert pressure.is_available
    assert pressure.level() == "low"


@pytest.mark.parametrize(
    ("stall_us", "window_us", "argument"),
    [
        (0, 1_000_000, "psi.stall-us"),
        (-1, 1_000_000, "psi.stall-us"),
        (1_000_001, 1_000_000, "psi.stall-us"),
        (1, 499_999, "psi.window-us"),
        (1, 10_000_001, "psi.window-us"),
        (1, -1, "psi.window-us"),
    ],
)
def test_a_trigger_out_of_range_is_a_bad_argument(
    make_tree: MakeTree, stall_us: int, window_us: int, argument: str
) -> None:
    pressure = Pressure(make_tree(pressure_file(0, 0)), max_triggers=8)
    with pytest.raises(BadRequest) as caught:
        pressure.watch([PsiTrigger("some", stall_us, window_us)], NOBODY)
    assert caught.value.data["argument"] == argument


def test_a_trigger_that_was_asked_for_needs_psi(make_tree: MakeTree) -> None:
    with pytest.raises(NotSupported):
        Pressure(make_tree({}), max_triggers=8).watch([PsiTrigger("some", 1, 1_000_000)], NOBODY)


def test_a_trigger_that_the_kernel_refuses_names_the_file(make_tree: MakeTree) -> None:
    tree = make_tree({})
    tree.path(PRESSURE_FILE).mkdir(parents=True)
    with pytest.raises(KernelFailure, match=f"failed to arm a trigger on .*{PRESSURE_FILE}: Is a directory"):
        Pressure(tree, max_triggers=8).watch([PsiTrigger("full", 1, 1_000_000)], NOBODY)


def test_more_triggers_than_allowed_are_refused_before_one_is_armed(make_tree: MakeTree) -> None:
    pressure = Pressure(make_tree({}), max_triggers=2)
    with pytest.raises(Busy) as caught:
        pressure.watch([PsiTrigger("some", 1, 1_000_000)] * 3, NOBODY)
    assert caught.value.data["limit"] == 2
