"""Bookkeeping of a session, by what guard and net say."""

from __future__ import annotations

import errno
from typing import Any

import pytest

from ballast.guest.quiesce.forecast import FileSystem, Plan, Skipped
from ballast.guest.quiesce.outcome import Outcome, end_reason

ONE, TWO, LEFT_OUT = (FileSystem(f"8:{n}", "ext4", f"/dev/sd{n}", (f"/{n}",)) for n in (1, 2, 3))


def make_outcome() -> Outcome:
    """Two to freeze, one left out."""
    return Outcome(Plan(((ONE,), (TWO,)), (Skipped(LEFT_OUT, "read-only"),)))


def settled(index: int, state: str, number: int = 0) -> dict[str, Any]:
    """The guard's word that one FIFREEZE returned."""
    return {"event": "settled", "index": index, "state": state, "errno": number, "freeze_ms": 1.5}


def thawed(state: str, number: int = 0) -> dict[str, Any]:
    """The guard's last word on one."""
    return {"state": state, "errno": number, "freeze_ms": 1.5}


def states(outcome: Outcome) -> list[str]:
    return [result.state for result in outcome.filesystems]


def test_all_are_freezing_until_the_guard_says_otherwise() -> None:
    outcome = make_outcome()
    assert states(outcome) == ["freezing", "freezing", "skipped"]
    assert outcome.filesystems[2].reason == "read-only"
    seen = [outcome.is_whole]
    for index in (1, 0):
        outcome.settle(settled(index, "frozen"))
        seen.append(outcome.is_whole)
    assert seen == [False, False, True]
    assert [(one.mountpoint, one.device, one.type, one.freeze_ms) for one in outcome.in_state("frozen")] == [
        ("/1", "/dev/sd1", "ext4", 1.5),
        ("/2", "/dev/sd2", "ext4", 1.5),
    ]


@pytest.mark.parametrize(
    ("number", "state", "reason", "is_whole"),
    [
        (errno.EOPNOTSUPP, "skipped", "this type cannot be frozen", True),
        (errno.EBUSY, "failed", "somebody else has frozen it already", False),
        (errno.EIO, "failed", "Input/output error", False),
    ],
)
def test_what_failed_says_why(number: int, state: str, reason: str, is_whole: bool) -> None:
    outcome = make_outcome()
    outcome.settle(settled(0, "frozen"))
    outcome.settle(settled(1, "failed", number))
    result = outcome.filesystems[1]
    assert (result.state, result.reason) == (state, reason)
    assert outcome.is_whole == is_whole


def test_nothing_frozen_is_not_whole() -> None:
    assert not Outcome(Plan((), (Skipped(LEFT_OUT, "read-only"),))).is_whole


@pytest.mark.parametrize(
    ("said", "expected", "broken"),
    [
        ([thawed("thawed"), thawed("thawed")], ["thawed", "thawed"], False),
        ([thawed("thawed", errno.EINVAL), thawed("thawed")], ["thawed", "thawed"], True),
        ([thawed("thawed"), thawed("untouched")], ["thawed", "thawed"], False),
        ([thawed("thawed"), thawed("freezing")], ["thawed", "freezing"], False),
        ([thawed("thawed"), thawed("failed", errno.EIO)], ["thawed", "frozen"], False),
    ],
)
def test_the_guard_s_last_word(said: list[dict[str, Any]], expected: list[str], *, broken: bool) -> None:
    outcome = make_outcome()
    for index in range(2):
        outcome.settle(settled(index, "frozen"))
    assert outcome.thawed_by_guard(said) == broken
    assert states(outcome) == [*expected, "skipped"]


def test_when_all_is_thawed_what_failed_stays_failed() -> None:
    outcome = make_outcome()
    outcome.settle(settled(0, "failed", errno.EBUSY))
    outcome.all_thawed()
    assert states(outcome) == ["failed", "thawed", "skipped"]


@pytest.mark.parametrize(
    ("final", "broken", "expired", "ender", "reason"),
    [
        ({"event": "thawed", "cause": "thaw"}, False, False, None, None),
        ({"event": "thawed", "cause": "thaw"}, False, False, "thawed-by-qga", "thawed-by-qga"),
        ({"event": "thawed", "cause": "thaw"}, False, False, "agent-restarted", "agent-restarted"),
        ({"event": "thawed", "cause": "thaw"}, True, False, None, "thawed-by-stranger"),
        ({"event": "thawed", "cause": "lease"}, False, True, None, "lease-expired"),
        ({"event": "thawed", "cause": "lease"}, True, True, "thawed-by-qga", "lease-expired"),
        ({"event": "thawed", "cause": "stopped"}, False, False, None, "guard-lost"),
        ({"event": "thawed", "cause": "agent-lost"}, False, False, None, "guard-lost"),
        ({"event": "net", "thawed": {}}, False, False, None, "guard-lost"),
        ({"event": "net", "thawed": {}}, False, True, None, "lease-expired"),
    ],
)
def test_why_a_session_did_not_hold(
    final: dict[str, Any], ender: Any, reason: str | None, *, broken: bool, expired: bool
) -> None:
    assert end_reason(final, broken=broken, expired=expired, ender=ender) == reason
