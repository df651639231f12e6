"""What is kept of decisions, and what the journal is told."""

from __future__ import annotations

import logging
import time

import pytest

from ballast.guest.memory.decisions import KEPT, Decisions
from ballast.guest.service.systemd import _own_fields
from ballast.wire.memory_names import Decision


def test_a_decision_is_kept_with_the_numbers_that_it_was_made_from() -> None:
    decisions, before_ms = Decisions(), time.time_ns() // 1_000_000
    decisions.note("gave-way", "pressure", 64 << 20, available_bytes=5 << 20, some_avg10=12.5)
    (kept,) = decisions.last()
    assert before_ms <= kept.at_ms <= time.time_ns() // 1_000_000
    numbers = {"available-bytes": 5 << 20, "some-avg10": 12.5}
    assert kept == Decision(kept.at_ms, "gave-way", 64 << 20, "pressure", numbers)


def test_only_the_last_are_kept_the_newest_last() -> None:
    decisions = Decisions()
    for bytes_ in range(KEPT + 3):
        decisions.note("deflated", "asked", bytes_)
    assert [one.bytes for one in decisions.last()] == list(range(3, KEPT + 3))


def test_a_refusal_that_is_only_repeated_is_kept_once_with_its_last_numbers(caplog: pytest.LogCaptureFixture) -> None:
    decisions = Decisions()
    for number in range(5):
        decisions.note("not-inflated", "floor", 4096, room_bytes=number)
    decisions.note("not-inflated", "pressure", 4096)
    assert [(one.reason, one.numbers) for one in decisions.last()] == [("floor", {"room-bytes": 4}), ("pressure", {})]
    assert len(caplog.records) == 2


def test_what_is_kept_is_not_what_was_handed_out() -> None:
    decisions = Decisions()
    decisions.last().clear()
    decisions.note("deflated", "asked", 1)
    decisions.last().clear()
    assert len(decisions.last()) == 1


def test_the_journal_is_told_in_words_and_in_fields(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        Decisions().note("not-inflated", "floor", 4096, available_bytes=8192, some_avg10=1.0 / 3)
    (record,) = caplog.records
    assert record.getMessage() == "memory not-inflated: 4096 bytes, floor, available-bytes 8192, some-avg10 0.33"
    assert _own_fields(record) == {
        "BALLAST_CHANGE": "not-inflated",
        "BALLAST_REASON": "floor",
        "BALLAST_BYTES": "4096",
        "BALLAST_AVAILABLE_BYTES": "8192",
        "BALLAST_SOME_AVG10": str(1.0 / 3),
    }
