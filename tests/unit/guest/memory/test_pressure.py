"""Pressure events without a kernel that presses: what a trigger may be. That triggers fire is shown in guests."""

from __future__ import annotations

import pytest

from ballast.guest.events import Subscription
from ballast.guest.linux.psi import PRESSURE_FILE
from ballast.guest.linux.tree import Tree
from ballast.guest.memory.groups import OUR_FILE
from ballast.guest.memory.level import PressureLevel
from ballast.guest.memory.pressure import DEFAULT_TRIGGERS, Pressure, _Ours
from ballast.wire.errors import BadRequest, Busy, KernelFailure, NotSupported
from ballast.wire.memory_names import Level, PsiTrigger
from ballast.wire.message import Event
from tests.unit.guest.conftest import MakeTree
from tests.unit.guest.memory.test_level import figures

NOBODY = Subscription(frozenset(), lambda _event: True)


class Told:
    """A subscriber who takes everything."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def deliver(self, event: Event) -> bool:
        self.events.append(event)
        return True


def make_pressure(tree: Tree, max_triggers: int = 8) -> Pressure:
    return Pressure(tree, PressureLevel(tree), max_triggers=max_triggers)


@pytest.mark.parametrize("files", [{}, {PRESSURE_FILE: ""}, {PRESSURE_FILE: "garbage"}])
def test_without_psi_it_is_not_available(make_tree: MakeTree, files: dict[str, str]) -> None:
    assert not make_pressure(make_tree(files)).is_available


@pytest.mark.parametrize("refused", [False, True])
def test_who_asks_for_the_default_triggers_just_hears_nothing_without_psi(
    make_tree: MakeTree, caplog: pytest.LogCaptureFixture, *, refused: bool
) -> None:
    tree = make_tree({})
    if refused:
        tree.path(PRESSURE_FILE).mkdir(parents=True)
    make_pressure(tree).watch(None, NOBODY)()
    (line,) = caplog.messages
    assert line.startswith("no pressure events for a subscriber: ")


def test_recorded(recorded: Tree) -> None:
    assert make_pressure(recorded).is_available


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
    pressure = make_pressure(make_tree({PRESSURE_FILE: figures(0, 0)}))
    with pytest.raises(BadRequest) as caught:
        pressure.watch([PsiTrigger("some", stall_us, window_us)], NOBODY)
    assert caught.value.data["argument"] == argument


def test_a_trigger_that_was_asked_for_needs_psi(make_tree: MakeTree) -> None:
    with pytest.raises(NotSupported):
        make_pressure(make_tree({})).watch([PsiTrigger("some", 1, 1_000_000)], NOBODY)


def test_a_trigger_that_the_kernel_refuses_names_the_file(make_tree: MakeTree) -> None:
    tree = make_tree({})
    tree.path(PRESSURE_FILE).mkdir(parents=True)
    with pytest.raises(KernelFailure, match=f"failed to arm a trigger on .*{PRESSURE_FILE}: Is a directory"):
        make_pressure(tree).watch([PsiTrigger("full", 1, 1_000_000)], NOBODY)


def test_more_triggers_than_allowed_are_refused_before_one_is_armed(make_tree: MakeTree) -> None:
    pressure = make_pressure(make_tree({}), max_triggers=2)
    with pytest.raises(Busy) as caught:
        pressure.watch([PsiTrigger("some", 1, 1_000_000)] * 3, NOBODY)
    assert caught.value.data["limit"] == 2


@pytest.mark.parametrize(
    ("trigger", "ours_us", "level"),
    [
        (DEFAULT_TRIGGERS[0], 0, "medium"),
        (DEFAULT_TRIGGERS[0], 50_000, "medium"),
        (DEFAULT_TRIGGERS[0], 50_001, "low"),
        (DEFAULT_TRIGGERS[0], 10**9, "low"),
        (DEFAULT_TRIGGERS[1], 0, "critical"),
        (DEFAULT_TRIGGERS[1], 1, "low"),
        (PsiTrigger("some", 70_000, 2_000_000), 0, "low"),
    ],
)
def test_an_event_tells_the_level_of_its_window_without_what_may_have_been_ours(
    make_tree: MakeTree, trigger: PsiTrigger, ours_us: int, level: Level
) -> None:
    told = Told()
    tree = make_tree({PRESSURE_FILE: figures(1.5, 0.5), OUR_FILE: figures(0, 0)})
    ours = _Ours(tree, trigger.kind)
    make_tree({OUR_FILE: figures(0, 0).replace("total=5", f"total={5 + ours_us}")})
    assert make_pressure(tree)._tell(trigger, Subscription(frozenset(), told.deliver), ours)
    assert told.events[0].data == {
        "level": level,
        "kind": trigger.kind,
        "stall-us": trigger.stall_us,
        "window-us": trigger.window_us,
        "some-avg10": 1.5,
        "full-avg10": 0.5,
    }


def test_an_event_tells_no_less_than_the_level_that_it_is_now(make_tree: MakeTree) -> None:
    told = Told()
    tree = make_tree({PRESSURE_FILE: figures(0, 0)})
    level = PressureLevel(tree)
    level.hear("full")
    subscription = Subscription(frozenset(), told.deliver)
    Pressure(tree, level, max_triggers=1)._tell(DEFAULT_TRIGGERS[0], subscription, _Ours(tree, "some"))
    assert told.events[0].data["level"] == "critical"


def test_what_was_ours_is_counted_from_the_last_event_on(make_tree: MakeTree) -> None:
    ours = _Ours(make_tree({OUR_FILE: figures(0, 0).replace("total=5", "total=1000")}), "full")
    make_tree({OUR_FILE: figures(0, 0).replace("total=5", "total=1700")})
    assert ours.since_us() == 700
    ours.note()
    assert ours.since_us() == 0


@pytest.mark.parametrize("files", [{}, {OUR_FILE: "garbage"}])
def test_where_the_kernel_does_not_tell_nothing_was_ours(make_tree: MakeTree, files: dict[str, str]) -> None:
    assert _Ours(make_tree(files), "some").since_us() == 0
