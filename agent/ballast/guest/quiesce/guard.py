"""The guard: freezes and thaws with descriptors that were opened before the freeze, and ends the lease.

A process of its own, so that no ioctl that hangs can take the agent along. One thread for each file system issues its
FIFREEZE and, when released, its FITHAW: a freeze that returns into a cancelled session is thawed by the same thread at
once, with no window between. The main thread never makes a call that can wait: no disk, no logging, no imports, no
waiting notify. It ends the session when the agent says so, at lease end, on SIGTERM, and when the agent's socket
closes, whatever the reason. Memory is locked, threads are started before the first ioctl.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import socket
import struct
import sys
import threading
from collections.abc import Callable
from typing import Any

from systemd.daemon import listen_fds

from ballast.guest.linux import fsfreeze, mman, notify
from ballast.guest.quiesce import guard_protocol as protocol

IDLE_EXIT_S = 60.0
TICK_S = 1.0  # the watchdog is fed at least this often
LEVEL_THAW_S = 1.0  # how long one level's thaw may hold up the next
_UCRED = struct.Struct("3i")


class Freezer:
    """One file system and the thread that freezes and thaws it.

    States: waiting -> freezing -> frozen -> thawed; "failed" if FIFREEZE said no, "untouched" if it never ran.
    ``errno`` is that of the failed FIFREEZE, or of the FITHAW (EINVAL: somebody else thawed it before).
    """

    def __init__(self, fd: int, changed: Callable[[], None]) -> None:
        self.fd = fd
        self.state = "waiting"
        self.errno = 0
        self.freeze_s = 0.0
        self.go = threading.Event()
        self.release = threading.Event()
        self._changed = changed
        threading.Thread(target=self._run, daemon=True).start()

    @property
    def is_settled(self) -> bool:
        """Whether its FIFREEZE has returned."""
        return self.state not in ("waiting", "freezing")

    @property
    def is_over(self) -> bool:
        """Whether nothing is left to thaw."""
        return self.state in ("thawed", "failed", "untouched")

    def _run(self) -> None:
        self.go.wait()
        if self.release.is_set():
            self.state = "untouched"
        else:
            self._freeze_and_thaw()
        os.close(self.fd)
        self._changed()

    def _freeze_and_thaw(self) -> None:
        self.state = "freezing"
        started_s = protocol.boottime_s()
        try:
            fsfreeze.freeze(self.fd)
        except OSError as error:
            self.errno = error.errno or 0
            self.state = "failed"
            return
        self.freeze_s = protocol.boottime_s() - started_s
        self.state = "frozen"
        self._changed()
        self.release.wait()
        try:
            fsfreeze.thaw(self.fd)
        except OSError as error:
            self.errno = error.errno or 0
        self.state = "thawed"


class Hold:
    """One session: levels of file systems, frozen first to last and thawed last to first."""

    def __init__(self, levels: list[list[int]], fds: list[int], expires_s: float, changed: Callable[[], None]) -> None:
        self.freezers = [Freezer(fd, changed) for fd in fds]
        self.expires_s = expires_s
        self.cause: str | None = None
        self._levels = [[self.freezers[i] for i in level] for level in levels]
        self._to_freeze = list(self._levels)
        self._to_thaw: list[list[Freezer]] = []
        self._level_since_s = 0.0
        self._told: set[int] = set()
        self._told_frozen = False
        self._told_thawed = False

    @property
    def is_over(self) -> bool:
        """Whether no thread of this session is left."""
        return all(freezer.is_over for freezer in self.freezers)

    def cancel(self, cause: str) -> None:
        """Begin to thaw; the first cause stays."""
        if self.cause is None:
            self.cause = cause
            self._to_thaw = list(self._levels)
            self._level_since_s = 0.0

    def advance(self, now_s: float) -> list[dict[str, Any]]:
        """Take the next steps that can be taken, and return what the agent is to be told."""
        messages = self._news()
        if self.cause is None and now_s >= self.expires_s:
            self.cancel("lease")
        if self.cause is None:
            self._freeze_on()
            if not self._to_freeze and not self._told_frozen and all(f.is_settled for f in self.freezers):
                self._told_frozen = True
                messages = [*messages, *self._news(), {"event": "frozen"}]
        else:
            self._thaw_on(now_s)
            done = not self._to_thaw and all(f.is_over or f.state == "freezing" for f in self.freezers)
            if done and not self._told_thawed:
                self._told_thawed = True
                messages = [*messages, {"event": "thawed", "cause": self.cause, "filesystems": self._report()}]
        return messages

    def _freeze_on(self) -> None:
        while self._to_freeze:
            level = self._to_freeze[0]
            for freezer in level:
                freezer.go.set()
            if not all(freezer.is_settled for freezer in level):
                return
            self._to_freeze.pop(0)

    def _thaw_on(self, now_s: float) -> None:
        while self._to_thaw:
            level = self._to_thaw[-1]
            for freezer in level:
                freezer.release.set()
                freezer.go.set()
            self._level_since_s = self._level_since_s or now_s
            stuck = [f for f in level if not f.is_over and f.state != "freezing"]
            if stuck and now_s < self._level_since_s + LEVEL_THAW_S:
                return
            self._to_thaw.pop()
            self._level_since_s = 0.0

    def _news(self) -> list[dict[str, Any]]:
        news = []
        for index, freezer in enumerate(self.freezers):
            if freezer.state in ("frozen", "failed") and index not in self._told:
                self._told.add(index)
                news.append({"event": "settled", "index": index} | self._describe(freezer))
        return news

    def _report(self) -> list[dict[str, Any]]:
        return [self._describe(freezer) for freezer in self.freezers]

    @staticmethod
    def _describe(freezer: Freezer) -> dict[str, Any]:
        return {"state": freezer.state, "errno": freezer.errno, "freeze_ms": round(1000 * freezer.freeze_s, 3)}


class Guard:
    """The main loop: one client, one session."""

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        self._client: socket.socket | None = None
        self._hold: Hold | None = None
        self._stopping = False
        self._idle_since_s = protocol.boottime_s()
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
            notify.notify("WATCHDOG=1")

    def _wake(self) -> None:
        os.eventfd_write(self._wake_fd, 1)

    def _is_done(self) -> bool:
        if self._hold is not None:
            return False
        idle_s = protocol.boottime_s() - self._idle_since_s
        return self._stopping or (self._client is None and idle_s >= IDLE_EXIT_S)

    def _wait_s(self) -> float:
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
        if self._hold.is_over:
            self._hold = None
            self._idle_since_s = protocol.boottime_s()
            self._tell({"event": "idle"})

    def _accept(self) -> None:
        try:
            client, _ = self._listener.accept()
        except OSError:
            return
        client.setblocking(False)
        uid = _UCRED.unpack(client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))[1]
        if uid != os.geteuid() or self._client is not None or self._hold is not None or self._stopping:
            with contextlib.suppress(OSError):
                protocol.send(client, {"event": "busy"})
            client.close()
            return
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
        except (LookupError, TypeError):  # nonsense: treat it as we treat an agent that died
            self._lose_client()

    def _obey(self, message: dict[str, Any] | None, fds: list[int]) -> None:
        if message is None:
            self._lose_client()
        elif message["op"] == "freeze" and self._hold is None and not self._stopping:
            self._hold = Hold(message["levels"], fds, float(message["expires_s"]), self._wake)
        elif message["op"] == "renew" and self._hold is not None and self._hold.cause is None:
            self._hold.expires_s = float(message["expires_s"])
            self._tell({"event": "renewed"})
        elif message["op"] == "thaw" and self._hold is not None:
            self._hold.cancel("thaw")

    def _lose_client(self) -> None:
        assert self._client is not None
        self._selector.unregister(self._client)
        self._client.close()
        self._client = None
        self._idle_since_s = protocol.boottime_s()
        if self._hold is not None:
            self._hold.cancel("agent-lost")


def main() -> int:
    """Run on the socket that systemd passes; exit status 0."""
    fds = listen_fds()
    if not fds:
        sys.stderr.write("ballast-guard: no socket from systemd: it is started by ballast-guard.socket\n")
        return 2
    with contextlib.suppress(OSError):  # without CAP_IPC_LOCK it works all the same, a little later
        mman.lock_all_memory()
    guard = Guard(socket.socket(fileno=fds[0]))
    signal.signal(signal.SIGTERM, lambda _number, _frame: guard.stop())
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    notify.notify("READY=1")
    guard.run()
    notify.notify("STOPPING=1")
    return 0


if __name__ == "__main__":
    sys.exit(main())
