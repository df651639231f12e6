"""Killing a control group: all that is in it, and not who comes when the first has died."""

from __future__ import annotations

import os
import select
import subprocess
import threading
from pathlib import Path

from ballast.guest.linux.cgroup import kill_all

TIMEOUT_S = 20
ROUNDS = 50


def start(command: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(["/bin/sh", "-c", command], start_new_session=True)


def listed(path: Path, *pids: int) -> None:
    """What the kernel would list; replaced at once, and read through the descriptor that is open."""
    fd = os.open(path, os.O_WRONLY)
    os.pwrite(fd, "".join(f"{pid:>8}\n" for pid in pids).encode().ljust(32, b"\n"), 0)
    os.close(fd)


def succeed(pidfd: int, procs: Path, *pids: int) -> None:
    """When the first is dead another one is in the group."""
    select.select([pidfd], [], [])
    listed(procs, *pids)


def test_who_is_started_when_the_first_has_died_is_left_alone(tmp_path: Path) -> None:
    procs = tmp_path / "cgroup.procs"
    procs.touch()
    fd = os.open(procs, os.O_RDONLY)
    successor = start("sleep 60")  # as systemd's ExecStopPost=: it is in the group as soon as the first is dead
    try:
        for _ in range(ROUNDS):
            first, other = start("sleep 60"), start("sleep 60")
            listed(procs, first.pid, other.pid)
            pidfd = os.pidfd_open(first.pid)
            systemd = threading.Thread(target=succeed, args=(pidfd, procs, other.pid, successor.pid))
            systemd.start()
            kill_all(fd)
            assert (first.wait(TIMEOUT_S), other.wait(TIMEOUT_S)) == (-9, -9)
            systemd.join()
            os.close(pidfd)
            assert successor.poll() is None
    finally:
        successor.kill()
        successor.wait()
        os.close(fd)


def test_a_group_that_is_gone_is_no_error(tmp_path: Path) -> None:
    procs = tmp_path / "cgroup.procs"
    procs.touch()
    fd = os.open(procs, os.O_RDONLY)
    kill_all(fd)
    os.close(fd)
