"""The loop of the writers that ship: one answer for each line, whatever the line and whatever goes wrong."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ballast.guest.writers.program import AbsentError, Request, Writer, WriterError, run


class Example(Writer):
    """Fails in a way of its own at each verb."""

    def identify(self, request: Request) -> dict[str, Any]:
        raise AbsentError(f"no {request.config.get('server', 'server')}")

    def prepare(self, request: Request) -> dict[str, Any]:
        raise WriterError("is starting", retryable=True)

    def freeze(self, request: Request) -> dict[str, Any]:
        raise ConnectionRefusedError(111, "Connection refused", "/run/server")

    def post(self, request: Request) -> dict[str, Any]:
        return {"nonsense": 1 / 0}


def answers(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *lines: str) -> list[Any]:
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    assert run(Example()) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize(
    ("line", "answer"),
    [
        ('{"verb": "identify", "deadline-ms": 9000}', {"absent": "no server"}),
        ('{"verb": "identify", "deadline-ms": 9000, "config": {"server": "shop"}}', {"absent": "no shop"}),
        ('{"verb": "prepare", "deadline-ms": 9000}', {"error": "is starting", "retryable": True}),
        ('{"verb": "freeze", "deadline-ms": 9000}', {"error": "[Errno 111] Connection refused: '/run/server'"}),
        ('{"verb": "thaw", "deadline-ms": 9000}', {"held": True}),
        ('{"verb": "post", "deadline-ms": 9000}', {"error": "ZeroDivisionError: division by zero"}),
        ('{"verb": "abort", "deadline-ms": 9000}', {}),
        ('{"verb": "run", "deadline-ms": 9000}', {"error": "unknown verb run"}),
        ('{"verb": "left_s", "deadline-ms": 9000}', {"error": "unknown verb left_s"}),
        ('{"deadline-ms": 9000}', {"error": "KeyError: 'verb'"}),
        ('{"verb": "thaw"}', {"error": "KeyError: 'deadline-ms'"}),
    ],
)
def test_each_request_has_one_answer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], line: str, answer: dict[str, Any]
) -> None:
    assert answers(monkeypatch, capsys, line) == [answer]


@pytest.mark.parametrize("line", ["", "nonsense", "[]", "null", '{"verb": "thaw", "deadline-ms": "soon"}'])
def test_what_is_no_request_is_answered_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], line: str
) -> None:
    first, second = answers(monkeypatch, capsys, line, '{"verb": "abort", "deadline-ms": 9000}')
    assert "error" in first
    assert second == {}


def test_some_of_the_deadline_is_left_for_the_answer() -> None:
    left_s = Request({"verb": "freeze", "deadline-ms": 10_000}).left_s()
    assert 0 < left_s <= 9


def test_who_somebody_is_takes_no_minute() -> None:
    assert 0 < Request({"verb": "identify", "deadline-ms": 60_000}).left_s() <= 10


def test_what_cannot_be_waited_for_is_not_waited_for() -> None:
    assert Request({"verb": "freeze", "deadline-ms": -5}).left_s() == 0


def test_the_loop_needs_none_of_the_slow_modules() -> None:
    program = "import sys; sys.path.insert(0, 'agent'); import ballast.guest.writers.program; print(*sys.modules)"
    root = Path(__file__).parents[4]
    command = ["/usr/bin/python3", "-ISB", "-c", program]
    loaded = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.split()
    assert not {"typing", "asyncio", "dataclasses", "subprocess", "traceback", "logging"} & set(loaded)
