"""ballastctl as a process: signals in the middle of things, and output that goes on."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

import ballast
from ballast.host import show, verbs
from tests.unit.host.fake import DEADLINE_S, ENDED, FakeAgent, Refusal

END, BEGIN, SUBSCRIBE = "ballast-quiesce-end", "ballast-quiesce-begin", "ballast-subscribe"


class Running:
    """A running ballastctl, with its output at hand."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process

    async def line(self) -> str:
        """Give the next line of its output."""
        assert self.process.stdout
        async with asyncio.timeout(DEADLINE_S):
            return (await self.process.stdout.readline()).decode()

    async def told(self, part: str) -> None:
        """Wait until it says ``part`` on stderr."""
        assert self.process.stderr
        async with asyncio.timeout(DEADLINE_S):
            while part not in (line := (await self.process.stderr.readline()).decode()):
                assert line, f"ended without saying {part!r}"

    async def end(self) -> tuple[int, str, str]:
        """Wait for its end; status, and what is left of stdout and stderr."""
        async with asyncio.timeout(DEADLINE_S):
            out, err = await self.process.communicate()
        assert self.process.returncode is not None
        return self.process.returncode, out.decode(), err.decode()


@contextlib.asynccontextmanager
async def ballastctl(*words: str) -> AsyncIterator[Running]:
    """Start it; killed at the end if it still runs."""
    environment = os.environ | {"PYTHONPATH": str(Path(ballast.__file__).parents[1])}
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "ballast.host.cli", *words),
        env=environment,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        yield Running(process)
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


def is_running(pid: int) -> bool:
    """Whether there is such a process; one that was not waited for counts."""
    return Path(f"/proc/{pid}").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
async def test_a_signal_ends_the_command_and_then_thaws(fake: FakeAgent, number: signal.Signals) -> None:
    running_at_thaw = []

    def end(_: dict[str, Any]) -> dict[str, Any]:
        running_at_thaw.append(is_running(pid))
        return ENDED

    fake.answers[END] = end
    async with ballastctl("freeze", fake.target, "--", "sh", "-c", "echo $$; exec sleep 1000") as running:
        pid = int(await running.line())
        running.process.send_signal(number)
        status, _, err = await running.end()
    assert status == 128 + number
    assert running_at_thaw == [False]
    assert "thawing before leaving" in err


async def test_a_signal_while_it_freezes_thaws(fake: FakeAgent) -> None:
    fake.answers[BEGIN] = lambda _: asyncio.get_running_loop().create_future()
    async with ballastctl("freeze", fake.target) as running:
        name = (await fake.wait_for(BEGIN))["id"]
        running.process.send_signal(signal.SIGINT)
        assert (await running.end())[0] == 130
    assert fake.asked[-1] == (END, {"id": name})


async def test_a_second_signal_does_not_stop_the_thaw(fake: FakeAgent) -> None:
    answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    fake.answers[END] = lambda _: answer
    async with ballastctl("freeze", fake.target, "--", "sh", "-c", "echo $$; exec sleep 1000") as running:
        await running.line()
        running.process.send_signal(signal.SIGINT)
        await fake.wait_for(END)
        running.process.send_signal(signal.SIGINT)
        await running.told("already ending")
        answer.set_result(ENDED)
        assert (await running.end())[0] == 130


async def test_a_reader_that_goes_away_does_not_stop_the_thaw(fake: FakeAgent, tmp_path: Path) -> None:
    go = tmp_path / "go"
    os.mkfifo(go)
    async with ballastctl("freeze", fake.target, "--", "sh", "-c", f"echo $$; read x < {go}") as running:
        await running.line()
        transport = running.process._transport.get_pipe_transport(1)  # type: ignore[attr-defined]
        transport.close()
        await asyncio.to_thread(go.write_text, "x\n")
        status, _, err = await running.end()
    assert status == 1
    assert "Traceback" not in err
    assert fake.count(END) == 1


async def test_watch_prints_events_until_it_is_interrupted(fake: FakeAgent) -> None:
    async with ballastctl("watch", fake.target, "--psi", "full:1:2", "--psi", "some:3:4", "--demand", "500") as running:
        wanted = {
            "psi": [
                {"kind": "full", "stall-us": 1, "window-us": 2},
                {"kind": "some", "stall-us": 3, "window-us": 4},
            ],
            "demand": {"interval-ms": 500},
        }
        assert await fake.wait_for(SUBSCRIBE) == wanted
        await running.told("watching")
        fake.send_event(1, level="medium", full=12.5)
        assert (await running.line()).split()[1:] == ["BALLAST_PRESSURE", "level=medium", "full=12.5"]
        fake.send_event(5, "BALLAST_QUIESCE", id="\x1b[2J")
        assert (await running.line()).endswith(" BALLAST_QUIESCE id=\\x1b[2J\n")
        await running.told("3 events were lost")
        running.process.send_signal(signal.SIGINT)
        assert (await running.end())[0] == 0


async def test_watch_for_programs_prints_the_event_as_it_is(fake: FakeAgent) -> None:
    async with ballastctl("watch", fake.target, "--json") as running:
        assert await fake.wait_for(SUBSCRIBE) == {}
        await running.told("watching")
        fake.send_event(1, level="medium")
        event = json.loads(await running.line())
        assert event["timestamp"] == {"seconds": 1_700_000_000, "microseconds": 250_000}
        assert (event["event"], event["seq"], event["data"]) == ("BALLAST_PRESSURE", 1, {"level": "medium"})
        fake.drop()
        status, _, err = await running.end()
    assert status == 3
    assert "closed the connection" in err


async def test_watch_that_is_refused_says_why(fake: FakeAgent) -> None:
    fake.answers[SUBSCRIBE] = Refusal("unauthenticated", "ballast-subscribe needs ballast-authenticate first")
    async with ballastctl("watch", fake.target) as running:
        await running.told("ballast-subscribe needs ballast-authenticate first (--token-file)")
        assert (await running.end())[0] == 4


async def test_a_command_that_ignores_the_signal_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verbs, "TERMINATE_S", 0.05)
    process = await asyncio.create_subprocess_exec(
        *("sh", "-c", 'trap "" TERM; echo; while :; do read x; done'),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdout
    await process.stdout.readline()
    async with asyncio.timeout(DEADLINE_S):
        await verbs._stop(process)
        await process.communicate()
    assert process.returncode == -signal.SIGKILL


async def test_what_takes_its_time_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    told: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    monkeypatch.setattr(show, "PATIENCE_S", 0.0)
    monkeypatch.setattr(show, "say", told.set_result)
    with show.progress("freezing"):
        assert await asyncio.wait_for(told, DEADLINE_S) == "freezing, 0 s so far"


async def test_what_is_quick_is_not_told(capsys: pytest.CaptureFixture[str]) -> None:
    with show.progress("freezing"):
        await asyncio.sleep(0)
    assert capsys.readouterr().err == ""
