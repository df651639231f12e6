"""A program of somebody else's, run with a deadline: its output goes to the journal, and what it leaves running stays.

It is waited for by its pidfd (pidfd_open(2)), not by the end of its output, which a child of it may hold open for ever:
qemu-ga hangs there. subprocess would be a third of a writer's start.
"""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path

OUTPUT_LIMIT_BYTES = 1 << 16  # of one program, to the journal and into memory
REASON_LIMIT_CHARS = 200
_DEATH_S = 1.0  # for what was killed; longer is the uninterruptible sleep in which it may stay for ever
_STDERR = 2

# What it starts and leaves, a database server say, must live on after the writer's own unit: systemd.scope(5).
SCOPE = ("/usr/bin/systemd-run", "--scope", "--quiet", "--collect", "--no-ask-password")
BEGIN = ("/bin/sh", str(Path(__file__).with_name("begin.sh")))


class Ending:
    """How a program ended: ``status`` is its exit status, less than 0 a signal, None if it missed the deadline."""

    def __init__(self, status: int | None, output: bytes, spent_s: float) -> None:
        self.status = status
        self.output = output
        self.spent_s = spent_s

    def failure(self, fine: Sequence[int] = (0,)) -> str | None:
        """What went wrong, with the last line that it printed; None if its status is one of the ``fine`` ones."""
        if self.status in fine:
            return None
        if self.status is None:
            how = f"did not end within {self.spent_s:.1f} s"
        elif self.status < 0:
            how = f"was killed by signal {-self.status}"
        else:
            how = f"exited {self.status}"
        lines = self.output.decode(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        return f"{how}: {last[:REASON_LIMIT_CHARS]}" if last else how


def run_child(
    command: Sequence[str], timeout_s: float, *, started: Callable[[int], None] | None = None, quiet: bool = False
) -> Ending:
    """Run it to its end, or kill it and its process group at the deadline. ``started`` hears its pid at once.

    Standard input is empty. SIGPIPE stays ignored, as systemd has it for all services (IgnoreSIGPIPE= in
    systemd.exec(5)): what it leaves running may print into nothing and lives on. OSError if it cannot be started.
    """
    started_s = time.monotonic()
    read_fd, write_fd = os.pipe()
    os.set_blocking(read_fd, False)
    try:
        pid = _spawn(command, write_fd)
    except OSError:
        os.close(read_fd)
        raise
    finally:
        os.close(write_fd)
    output = bytearray()
    pidfd = os.pidfd_open(pid)
    try:
        if started is not None:
            started(pid)
        in_time = _watch(pidfd, read_fd, started_s + timeout_s, output, quiet=quiet)
        if not in_time:
            _kill_group(pid, pidfd)
        _take(read_fd, output, quiet=quiet)
    finally:
        os.close(pidfd)
        os.close(read_fd)
    _, wait_status = os.waitpid(pid, os.WNOHANG)
    status = os.waitstatus_to_exitcode(wait_status) if in_time else None
    return Ending(status, bytes(output), time.monotonic() - started_s)


def read_start_ticks(pid: int) -> int:
    """When a process started, in clock ticks since the boot: with its pid, who it is. OSError if there is none.

    proc(5), /proc/PID/stat, field 22; the second, the name, may hold anything: ``42 (a) b) S 1 42 42 0 …``.
    """
    return int(Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[19])


def await_stranger(pid: int, start_ticks: int, timeout_s: float) -> None:
    """Wait for what another process started and was killed in, and kill it and its process group at the deadline."""
    try:
        pidfd = os.pidfd_open(pid)
    except OSError:
        return
    try:
        if read_start_ticks(pid) == start_ticks and not _is_over(pidfd, timeout_s):
            _kill_group(pid, pidfd)
    except OSError:
        return
    finally:
        os.close(pidfd)


def _spawn(command: Sequence[str], output_fd: int) -> int:
    environment = {name: value for name, value in os.environ.items() if name != "RUNTIME_DIRECTORY"}
    return os.posix_spawn(
        command[0],
        list(command),
        environment,
        file_actions=[
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_DUP2, output_fd, 1),
            (os.POSIX_SPAWN_DUP2, output_fd, 2),
        ],
        setsid=True,
        setsigdef=[signal.SIGXFSZ],
    )


def _watch(pidfd: int, read_fd: int, deadline_s: float, output: bytearray, *, quiet: bool) -> bool:
    """Take what it prints until it ends. False if it does not in time."""
    poller = select.poll()
    poller.register(pidfd, select.POLLIN)
    poller.register(read_fd, select.POLLIN)
    while True:
        ready = dict(poller.poll(max(0.0, 1000 * (deadline_s - time.monotonic()))))
        if pidfd in ready:
            return True
        if read_fd in ready and not _take(read_fd, output, quiet=quiet):
            poller.unregister(read_fd)
        if time.monotonic() >= deadline_s:
            return False


def _take(read_fd: int, output: bytearray, *, quiet: bool) -> bool:
    """One piece of its output, kept and shown up to the limit. False at its end."""
    try:
        data = os.read(read_fd, OUTPUT_LIMIT_BYTES)
    except BlockingIOError:
        return True
    shown = data[: OUTPUT_LIMIT_BYTES - len(output)]
    output += shown
    if shown and not quiet:
        os.write(_STDERR, shown)
    return bool(data)


def _kill_group(pid: int, pidfd: int) -> None:
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    _is_over(pidfd, _DEATH_S)


def _is_over(pidfd: int, timeout_s: float) -> bool:
    poller = select.poll()
    poller.register(pidfd, select.POLLIN)
    return bool(poller.poll(1000 * timeout_s))
