"""The agent's own net below a freeze: copies of the descriptors, in a thread that needs neither event loop nor guard.

It thaws when the guard is gone or dying, or a second after the lease ended and nobody had thawed (the guard is stopped
or stuck). A stuck guard is killed first, so that it freezes nothing more; and since a FIFREEZE that waits for a writer
survives its process, each file system is tried until it thaws or no thread of the guard is left.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import threading
from collections.abc import Callable

from ballast.guest.linux import fsfreeze
from ballast.guest.quiesce.guard_client import GuardConnection
from ballast.guest.quiesce.guard_protocol import boottime_s

GRACE_S = 1.0  # after the lease's end, for the guard to do it
_TICK_S = 0.2  # poll() counts no suspend, as the lease does, and does not tell that a guard is only half dead
_RETRY_S = 0.05


class Net:
    """``fds`` in the order of thawing, duplicated; ``fired`` is called from the thread with {index: thawed by us}."""

    def __init__(
        self,
        fds: list[int],
        guard: GuardConnection,
        expires_s: float,
        fired: Callable[[dict[int, bool]], None],
    ) -> None:
        self.expires_s = expires_s
        self._fds = [os.dup(fd) for fd in fds]
        self._pidfd = os.dup(guard.pidfd)
        self._stat_fd = os.open(f"/proc/{guard.pid}/stat", os.O_RDONLY | os.O_CLOEXEC)
        self._fired = fired
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._order = ""
        self._not_ours: set[int] = set()
        self._lock = threading.Lock()
        threading.Thread(target=self._run, name="quiesce-net", daemon=True).start()

    def forget(self, index: int) -> None:
        """This one was not frozen by us: if it is frozen, it is a stranger's to thaw."""
        self._not_ours.add(index)

    def close(self) -> None:
        """All is thawed: nothing to do. Too late if it has fired."""
        self._tell("close")

    def fire(self) -> None:
        """Do not wait for the lease: kill the guard and thaw."""
        self._tell("fire")

    def _tell(self, order: str) -> None:
        with self._lock:  # the thread closes the descriptor when it ends
            if self._order != "ended":
                self._order = order
                os.eventfd_write(self._wake_fd, 1)

    def _run(self) -> None:
        poll = select.poll()
        poll.register(self._wake_fd, select.POLLIN)
        poll.register(self._pidfd, select.POLLIN)
        while True:
            left_s = self.expires_s + GRACE_S - boottime_s()
            ready = {fd for fd, _ in poll.poll(1000 * max(0.0, min(_TICK_S, left_s)))}
            if self._order == "close":
                break
            late = boottime_s() >= self.expires_s + GRACE_S
            if self._order == "fire" or self._pidfd in ready or late or self._is_half_dead():
                self._fired(self._thaw_all())
                break
        with self._lock:
            self._order = "ended"
            for fd in (*self._fds, self._pidfd, self._stat_fd, self._wake_fd):
                os.close(fd)

    def _is_half_dead(self) -> bool:
        """Whether the guard was killed while a thread of it waits in FIFREEZE.

        Until that thread returns the pidfd is not ready and the socket not closed; only the main thread is a zombie.
        """
        try:
            return os.pread(self._stat_fd, 1024, 0).rpartition(b")")[2].split()[0] in (b"Z", b"X")
        except OSError:  # ESRCH: dead altogether
            return True

    def _thaw_all(self) -> dict[int, bool]:
        with contextlib.suppress(OSError):  # it is gone already
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        thawed: dict[int, bool] = {}
        threads = [
            threading.Thread(target=self._thaw, args=(index, fd, thawed), daemon=True)
            for index, fd in enumerate(self._fds)
            if index not in self._not_ours
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return thawed

    def _thaw(self, index: int, fd: int, thawed: dict[int, bool]) -> None:
        thawed[index] = False
        while True:
            gone = self._guard_is_gone(_RETRY_S)
            try:
                fsfreeze.thaw(fd)
            except OSError as error:
                if gone or error.errno != errno.EINVAL:
                    return
            else:
                thawed[index] = True
                return

    def _guard_is_gone(self, wait_s: float) -> bool:
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        return bool(poll.poll(1000 * wait_s))
