"""sd_listen_fds; sd_notify, to a manager that reads and to one that does not."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from ballast.guest.linux.notify import listen_fds, notify, watchdog_s


@pytest.fixture(autouse=True)
def no_service_manager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever runs the tests."""
    for name in ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"):
        monkeypatch.delenv(name, raising=False)


def test_without_a_manager_nothing_is_sent() -> None:
    assert not notify("READY=1")


def test_a_manager_that_is_gone_is_no_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "none"))
    assert not notify("READY=1")


@pytest.mark.parametrize("abstract", [False, True])
def test_the_manager_hears_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *, abstract: bool) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        name = f"ballast-test-{os.getpid()}" if abstract else str(tmp_path / "notify")
        manager.bind(f"\0{name}" if abstract else name)
        monkeypatch.setenv("NOTIFY_SOCKET", f"@{name}" if abstract else name)
        assert notify("WATCHDOG=1")
        assert manager.recv(100) == b"WATCHDOG=1"


def test_a_manager_that_does_not_read_is_not_waited_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        # However long the queue is, it ends: the test's time limit is what a blocking send would run into.
        while notify("WATCHDOG=1"):
            pass


@pytest.mark.parametrize(
    ("usec", "pid", "seconds"),
    [
        (None, None, None),
        ("", None, None),
        ("soon", None, None),
        ("-5", None, None),
        ("5000000", None, 5.0),
        ("5000000", "ours", 5.0),
        ("5000000", "1", None),
    ],
)
def test_watchdog(monkeypatch: pytest.MonkeyPatch, usec: str | None, pid: str | None, seconds: float | None) -> None:
    if usec is not None:
        monkeypatch.setenv("WATCHDOG_USEC", usec)
    if pid is not None:
        monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()) if pid == "ours" else pid)
    assert watchdog_s() == seconds


@pytest.mark.parametrize(
    ("pid", "count"), [(None, "1"), ("", "1"), ("1", "1"), ("ours", None), ("ours", ""), ("ours", "-1"), ("ours", "0")]
)
def test_what_is_passed_to_another_or_is_nothing_is_not_ours(
    monkeypatch: pytest.MonkeyPatch, pid: str | None, count: str | None
) -> None:
    for name, value in (("LISTEN_PID", str(os.getpid()) if pid == "ours" else pid), ("LISTEN_FDS", count)):
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    assert listen_fds() == []


def test_what_is_passed_is_taken_once_and_not_inherited() -> None:
    program = (
        "import os; os.dup2(0, 3); os.dup2(0, 4)\n"
        "os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS='2', LISTEN_FDNAMES='a:b')\n"
        "from ballast.guest.linux.notify import listen_fds\n"
        "print(listen_fds(), os.get_inheritable(3), listen_fds(), [n for n in os.environ if n.startswith('LISTEN')])"
    )
    ran = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert ran.stdout == "[3, 4] False [] []\n"
