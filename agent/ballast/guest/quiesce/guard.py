"""The guard: freezes and thaws with descriptors that were opened before the freeze, and ends the lease.

A process of its own, so that no ioctl that hangs can take the agent along. Threads of ``freezer`` issue the ioctls;
the main thread never makes a call that can wait: no disk, no logging, no imports, no
waiting notify. It ends the session when the agent says so, at lease end, on SIGTERM, and when the agent's socket
closes, whatever the reason. Memory is locked, threads are started before the first ioctl.
"""

from __future__ import annotations

import contextlib
import gc
import math
import os
import selectors
import signal
import socket
import struct
import sys
from typing import Any

from ballast.guest.linux import mman, notify, rcu
from ballast.guest.linux.tree import Tree
from ballast.guest.linux.writeback import DirtyLimit
from ballast.guest.quiesce import guard_protocol as protocol
from ballast.guest.quiesce.freezer import Freezes
from ballast.guest.quiesce.lifelines import Lifelines

IDLE_EXIT_S = 60.0
TICK_S = 1.0  # the watchdog is fed about this often
LIMIT_S = 10.0  # how long all who write may be slowed down for a freeze that does not come
LIMIT_TICK_S = 0.05
_UCRED = struct.Struct("3i")


class Guard:
    """The main loop: one client, one session."""

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        self._client: socket.socket | None = None
        self._hold: Freezes | None = None
        self._writers = Lifelines([])
        self._is_undoing = False
        self._stopping = False
        self._idle_since_s = protocol.boottime_s()
        self._fed_s = 0.0
        self._limit = DirtyLimit(Tree())
        self._limited_until_s: float | None = None
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._wake_fd, selectors.EVENT_READ)
        self._selector.register(listener, selectors.EVENT_READ)
        listener.setblocking(False)

    def stop(self) -> None:
        """Thaw, then leave the loop."""
        self._stopping = True
        self._wake()

    def run(self) -> None:
        """Serve until stopped, or until nobody came for a minute."""
        while not self._is_done():
            for key, _ in self._selector.select(self._wait_s()):
                if key.fileobj is self._listener:
                    self._accept()
                elif key.fileobj is self._client:
                    self._receive()
                else:
                    os.eventfd_read(self._wake_fd)
            self._advance()
            self._limit_dirty()
            self._feed_watchdog()

    def _feed_watchdog(self) -> None:
        """Not at every turn: it wakes PID 1, and while something is frozen others need the CPU more."""
        now_s = protocol.boottime_s()
        if now_s >= self._fed_s + TICK_S / 2:
            self._fed_s = now_s
            notify.notify("WATCHDOG=1")

    def _wake(self) -> None:
        os.eventfd_write(self._wake_fd, 1)

    def _is_done(self) -> bool:
        if self._hold is not None or self._is_undoing:
            return False
        idle_s = protocol.boottime_s() - self._idle_since_s
        return self._stopping or (self._client is None and idle_s >= IDLE_EXIT_S)

    def _wait_s(self) -> float:
        if self._limited_until_s is not None and self._hold is None:
            return LIMIT_TICK_S
        if self._hold is None or self._hold.cause is not None:
            return TICK_S if self._hold is None else 0.1
        return max(0.0, min(TICK_S, self._hold.expires_s - protocol.boottime_s()))

    def _advance(self) -> None:
        if self._hold is None:
            return
        if self._stopping:
            self._hold.cancel("stopped")
        for message in self._hold.advance(protocol.boottime_s()):
            self._tell(message)
        if not self._hold.is_freezing:
            rcu.restore()
            self._lift_limit()
        if self._hold.is_over:
            self._hold = None
            self._idle_since_s = protocol.boottime_s()
            self._tell({"event": "idle"})
            if self._client is None:
                self._undo_writers()

    def _accept(self) -> None:
        try:
            client, _ = self._listener.accept()
        except OSError:
            return
        client.setblocking(False)
        uid = _UCRED.unpack(client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))[1]
        if uid != os.geteuid() or self._hold is not None or self._is_undoing or self._stopping:
            with contextlib.suppress(OSError):
                protocol.send(client, {"event": "busy"})
            client.close()
            return
        if self._client is not None:  # it holds nothing, and its hanging up is only not heard yet
            self._lose_client()
        self._client = client
        self._selector.register(client, selectors.EVENT_READ)
        self._tell({"event": "hello", "version": protocol.VERSION, "pid": os.getpid()})

    def _tell(self, message: dict[str, Any]) -> None:
        if self._client is not None:
            with contextlib.suppress(OSError):  # an agent that is gone is heard of by its closed socket
                protocol.send(self._client, message)

    def _receive(self) -> None:
        assert self._client is not None
        try:
            message, fds = protocol.receive(self._client)
        except BlockingIOError:
            return
        except (OSError, ValueError):
            message, fds = None, []
        try:
            self._obey(message, fds)
        except (LookupError, TypeError, ValueError):  # nonsense: treat it as we treat an agent that died
            self._lose_client()

    def _obey(self, message: dict[str, Any] | None, fds: list[int]) -> None:
        if message is None:
            self._lose_client()
        elif message["op"] == "freeze" and self._hold is None and not self._stopping:
            self._hold = Freezes(message["levels"], fds, _lease(message), self._wake)
            rcu.expedite()
            self._limit.loosen()  # a writer that waits at the limit holds up the freeze of its file system
        elif message["op"] == "limit" and self._hold is None:
            self._limited_until_s = protocol.boottime_s() + LIMIT_S
        elif message["op"] == "renew" and self._hold is not None and self._hold.cause is None:
            self._hold.expires_s = _lease(message)
            self._tell({"event": "renewed"})
        elif message["op"] == "thaw" and self._hold is not None:
            self._hold.cancel("thaw")
        elif message["op"] == "keep":
            self._writers.drop()
            self._writers = Lifelines(fds)
        elif message["op"] == "release":
            self._writers.drop()

    def _lose_client(self) -> None:
        assert self._client is not None
        self._selector.unregister(self._client)
        self._client.close()
        self._client = None
        self._idle_since_s = protocol.boottime_s()
        self._lift_limit()
        if self._hold is not None:
            self._hold.cancel("agent-lost")
        else:
            self._undo_writers()

    def _limit_dirty(self) -> None:
        if self._limited_until_s is None or self._hold is not None:
            return
        if protocol.boottime_s() < self._limited_until_s:
            self._limit.follow()
        else:
            self._lift_limit()

    def _lift_limit(self) -> None:
        if self._limited_until_s is not None:
            self._limited_until_s = None
            self._limit.restore()

    def _undo_writers(self) -> None:
        """The agent is dead, and what it had frozen is thawed."""
        if self._writers.are_none:
            return
        self._is_undoing = True

        def done() -> None:
            self._is_undoing = False
            self._wake()

        self._writers.undo(done)


def _lease(message: dict[str, Any]) -> float:
    expires_s = float(message["expires_s"])
    if not math.isfinite(expires_s):
        raise ValueError("a lease must end")
    return expires_s


def main() -> int:
    """Run on the socket that systemd passes; exit status 0."""
    fds = notify.listen_fds()
    if not fds:
        sys.stderr.write("ballast-guard: no socket from systemd: it is started by ballast-guard.socket\n")
        return 2
    rcu.restore()  # should an earlier guard have been killed in the middle of a freeze
    DirtyLimit(Tree()).restore()
    with contextlib.suppress(OSError):  # without CAP_IPC_LOCK it works all the same, a little later
        mman.lock_all_memory()
    gc.freeze()  # the garbage collector need not look through what stays
    guard = Guard(socket.socket(fileno=fds[0]))
    signal.signal(signal.SIGTERM, lambda _number, _frame: guard.stop())
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    notify.notify("READY=1")
    guard.run()
    notify.notify("STOPPING=1")
    return 0


if __name__ == "__main__":
    sys.exit(main())
