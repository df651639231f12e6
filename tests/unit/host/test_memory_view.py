"""Decisions as a table: every word of the wire has its own, and what a later or hostile guest says is shown."""

from __future__ import annotations

import json
import typing
from pathlib import Path
from typing import Any

import pytest

from ballast.host.cli import main
from ballast.host.memory_view import _CHANGES, _REASONS, decisions_table
from ballast.wire.memory_names import Change, ChangeReason, Decision
from tests.unit.host.fake import serve_in_thread

DECISION = {
    "at-ms": 1_700_000_000_000,
    "change": "gave-way",
    "bytes": 512 << 20,
    "reason": "pressure",
    "numbers": {"available-bytes": 50 << 20, "some-avg10": 31.25},
}
LATER = {
    "change": "of-later",
    "reason": "\x1b[2J",
    "at-ms": 2**62,
    "numbers": {"x-share": 0.1234567},
    "from-the-future": 1,
}


def test_every_word_is_explained() -> None:
    assert _CHANGES.keys() == set(typing.get_args(Change))
    assert _REASONS.keys() == set(typing.get_args(ChangeReason))


def test_nothing_is_said_to_be_nothing() -> None:
    assert decisions_table([]).title == "no change of memory since the agent started"


def test_a_number_that_is_none_is_shown_as_that() -> None:
    decision = Decision(0, "deflated", 0, "asked", {"x-bytes": float("inf"), "y": float("nan")})
    assert decisions_table([decision]).rows[0][-1] == "x ?, y ?"


@pytest.fixture
def ctl(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Any:
    def run(decisions: list[Any], *words: str) -> tuple[int, str]:
        with serve_in_thread(tmp_path / "agent.sock") as agent:
            agent.answers["ballast-memory-explain"] = decisions
            config = tmp_path / "host.toml"
            status = main(["memory", "explain", agent.target, "--config", str(config), *words])
        return status, capfd.readouterr().out

    return run


def test_a_decision_in_words(ctl: Any) -> None:
    status, out = ctl([DECISION])
    assert status == 0
    words = ("the balloon gave way", "512 MiB", "tasks waited for memory", "available 50 MiB, some-avg10 31.25")
    assert [word for word in words if word not in out] == []


def test_a_decision_for_programs(ctl: Any) -> None:
    assert json.loads(ctl([DECISION], "--json")[1]) == [DECISION]


def test_what_a_later_guest_says_is_shown_and_does_no_harm(ctl: Any) -> None:
    status, out = ctl([DECISION | LATER])
    assert status == 0
    assert "  of-later  512 MiB  \\x1b[2J  x-share 0.123457" in out
