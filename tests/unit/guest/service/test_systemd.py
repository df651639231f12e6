"""The agent as a service: a journal that never waits, passed sockets, credentials, the watchdog."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from ballast.guest.service.systemd import JournalHandler, feed_watchdog, read_credential


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Iterator[logging.Logger]:
    """A logger whose only handler is ours, run by hand."""
    monkeypatch.delenv("JOURNAL_STREAM", raising=False)
    logger = logging.getLogger("ballast-test-journal")
    logger.propagate = False
    logger.setLevel(logging.DEBUG)
    handler = JournalHandler()
    logger.addHandler(handler)
    yield logger
    logger.removeHandler(handler)
    handler.close()


def close(log: logging.Logger) -> None:
    """Wait until everything is written."""
    for handler in log.handlers:
        handler.close()


def test_by_hand_lines_go_to_stderr(log: logging.Logger, capsys: pytest.CaptureFixture[str]) -> None:
    log.info("ready %d", 5)
    log.error("name \udce9 from the wire")
    close(log)
    assert capsys.readouterr().err == "info: ready 5\nerror: name \\udce9 from the wire\n"


class Stuck:
    """A stderr whose reader sleeps until it is let go, and that fails then as often as it is told."""

    def __init__(self, *, awaited: int, fails: int = 0) -> None:
        self.entered, self.go, self.done = threading.Event(), threading.Event(), threading.Event()
        self.lines: list[str] = []
        self._awaited, self._fails = awaited, fails

    def write(self, line: str) -> None:
        self.entered.set()
        self.go.wait(10)
        if self._fails:
            self._fails -= 1
            raise BrokenPipeError
        self.lines.append(line)
        if len(self.lines) == self._awaited:
            self.done.set()


def test_a_journal_that_sleeps_is_not_waited_for_and_drops_are_counted(
    log: logging.Logger, monkeypatch: pytest.MonkeyPatch
) -> None:
    stuck = Stuck(awaited=1001)
    monkeypatch.setattr(sys, "stderr", stuck)
    log.info("first")
    assert stuck.entered.wait(10)
    for number in range(1005):
        log.info("%d", number)
    stuck.go.set()
    assert stuck.done.wait(10)
    assert stuck.lines[:2] == ["info: first\n", "info: 0 (5 earlier lines were dropped)\n"]
    assert stuck.lines[-1] == "info: 999\n"


def test_a_line_that_cannot_be_written_is_not_the_last(log: logging.Logger, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = Stuck(awaited=1, fails=1)
    monkeypatch.setattr(sys, "stderr", broken)
    log.info("lost")
    log.info("kept")
    broken.go.set()
    assert broken.done.wait(10)
    assert broken.lines == ["info: kept\n"]


@pytest.mark.parametrize(
    ("content", "credential"),
    [(b"secret", b"secret"), (b" secret\n", b"secret"), (b"", None), (b" \n", None), (b"\xff\0", b"\xff\0")],
)
def test_a_credential_is_read_without_white_space(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: bytes, credential: bytes | None
) -> None:
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    (tmp_path / "ballast.token").write_bytes(content)
    assert read_credential("ballast.token") == credential


def test_without_a_credential_there_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)
    assert read_credential("ballast.token") is None
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    assert read_credential("ballast.token") is None


def test_sockets_that_systemd_passes_are_known_by_their_family(tmp_path: Path) -> None:
    program = (
        "import os, sys; fds = [int(fd) for fd in sys.argv[1:]]\n"
        "for n, fd in enumerate(fds): os.dup2(fd, 3 + n)\n"
        "os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=str(len(fds)))\n"
        "from ballast.guest.service.systemd import passed_sockets\n"
        "print({family.name: sock.fileno() for family, sock in passed_sockets().items()})"
    )
    with socket.socket(socket.AF_UNIX) as one, socket.socket(socket.AF_INET) as two:
        for sock, name in ((one, str(tmp_path / "x")), (two, ("127.0.0.1", 0))):
            sock.bind(name)
            sock.listen()
        high = [os.dup(sock.fileno()) for sock in (one, two)]
        high = [os.dup2(fd, 50 + n) for n, fd in enumerate(high)]
        ran = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", program, *map(str, high)],
            pass_fds=high,
            check=True,
            capture_output=True,
            text=True,
        )
    assert ran.stdout == "{'AF_UNIX': 3, 'AF_INET': 4}\n"


async def test_the_watchdog_is_fed_twice_a_period(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    monkeypatch.setenv("WATCHDOG_USEC", "20000")
    monkeypatch.delenv("WATCHDOG_PID", raising=False)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as manager:
        manager.bind(str(tmp_path / "notify"))
        feeding = asyncio.create_task(feed_watchdog())
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(10):
            heard = [await loop.sock_recv(manager, 100) for _ in range(3)]
        feeding.cancel()
    assert heard == [b"WATCHDOG=1"] * 3


async def test_without_a_watchdog_none_is_fed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WATCHDOG_USEC", raising=False)
    await feed_watchdog()
