"""The guard's hold on writers: if the agent dies, it has them undone, in the reverse of the order of freezing.

It hangs up on one after the other. A writer whose input ends does so itself, and the ``ExecStopPost=`` of its unit sees
to its abort; when that has ended too, nobody is left at the other end of the socket. Stdlib only, as all of the guard.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import threading
from collections.abc import Callable

from ballast.guest.linux.cgroup import kill_all

UNDO_S = 10.0  # for one writer and its abort, before whatever it is doing is killed
KILLED_S = 10.0  # and then for the abort


class Lifelines:
    """``fds``: for each writer the socket to it and its cgroup.procs; taken over."""

    def __init__(self, fds: list[int]) -> None:
        if len(fds) % 2:
            raise ValueError("a lifeline is two descriptors")
        self._lines = list(zip(fds[::2], fds[1::2], strict=True))

    @property
    def are_none(self) -> bool:
        """Whether no writer is kept."""
        return not self._lines

    def drop(self) -> None:
        """The agent has them back."""
        for fds in self._lines:
            for fd in fds:
                os.close(fd)
        self._lines = []

    def undo(self, done: Callable[[], None]) -> None:
        """Begin, in a thread; ``done`` is called from it."""
        threading.Thread(target=self._undo_all, args=(done,), daemon=True).start()

    def _undo_all(self, done: Callable[[], None]) -> None:
        for sock_fd, procs_fd in reversed(self._lines):
            with socket.socket(fileno=os.dup(sock_fd)) as sock, contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_WR)
                if not _hangs_up(sock, UNDO_S):
                    kill_all(procs_fd)
                    _hangs_up(sock, KILLED_S)
        self.drop()
        done()


def _hangs_up(sock: socket.socket, timeout_s: float) -> bool:
    """Whether nobody is left at the other end, in time; what it still says is not read."""
    poll = select.poll()
    poll.register(sock, 0)  # POLLHUP is told always
    return bool(poll.poll(1000 * timeout_s))
