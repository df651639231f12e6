"""The agent's end of the socket to the guard."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
from typing import Any

from ballast.guest.quiesce import guard_protocol as protocol
from ballast.wire.errors import AgentError, Busy, DeadlineExceeded

_RETRY_S = 0.1


class GuardLost(AgentError):
    """The guard cannot be reached, or has gone."""

    reason = "kernel"


class GuardConnection:
    """One connection, for one session. Messages arrive in order through ``receive``."""

    def __init__(self, sock: socket.socket) -> None:
        self.pid = 0
        self.pidfd = -1
        self._sock = sock
        self._messages: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        asyncio.get_running_loop().add_reader(sock.fileno(), self._readable)

    @classmethod
    async def open(cls, path: str, *, timeout_s: float) -> GuardConnection:
        """Connect, which makes systemd start the guard, and hear its greeting. GuardLost, Busy, DeadlineExceeded.

        While an earlier guard is still leaving, systemd turns connections away: they are tried again.
        """
        deadline_s = time.monotonic() + timeout_s
        while True:
            try:
                return await cls._open_once(path, timeout_s=max(0.0, deadline_s - time.monotonic()))
            except GuardLost:
                if time.monotonic() + _RETRY_S >= deadline_s:
                    raise
            await asyncio.sleep(_RETRY_S)

    @classmethod
    async def _open_once(cls, path: str, *, timeout_s: float) -> GuardConnection:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        try:
            sock.connect(path)
        except OSError as error:
            sock.close()
            raise GuardLost(f"cannot reach the guard at {path}: {error.strerror}") from error
        connection = cls(sock)
        try:
            hello = await connection.receive(timeout_s=timeout_s)
            if hello["event"] == "busy":
                raise Busy("the guard is still thawing an earlier session")
            if hello["event"] != "hello":
                raise GuardLost("the guard went away before it greeted")
            connection.pid = int(hello["pid"])
            # The credentials of the socket are those of PID 1, which made it: the guard says its own pid.
            try:
                connection.pidfd = os.pidfd_open(connection.pid)
            except OSError as error:
                raise GuardLost("the guard went away after it greeted") from error
        except BaseException:
            connection.close()
            raise
        return connection

    async def receive(self, *, timeout_s: float | None) -> dict[str, Any]:
        """Wait for the next message; ``lost`` tells that the guard is gone. DeadlineExceeded when it says nothing."""
        try:
            async with asyncio.timeout(timeout_s):
                return await self._messages.get()
        except TimeoutError as error:
            raise DeadlineExceeded("the guard does not answer") from error

    def inject(self, message: dict[str, Any]) -> None:
        """Queue a message of our own behind the guard's."""
        self._messages.put_nowait(message)

    def send(self, message: dict[str, Any], fds: list[int] | None = None) -> None:
        """Send without waiting; a guard that is gone is heard of by ``receive``."""
        with contextlib.suppress(OSError):
            protocol.send(self._sock, message, fds)

    def limit_dirty(self) -> None:
        """Have whoever writes slowed down, until all is frozen or the session over; for some seconds at most."""
        self.send({"op": "limit"})

    def keep(self, lifelines: list[tuple[int, int]]) -> None:
        """Entrust writers, in the order of freezing: if we die it undoes them, last first, once all is thawed."""
        if lifelines:
            self.send({"op": "keep"}, [fd for lifeline in lifelines for fd in lifeline])

    def release(self) -> None:
        """Take the writers back."""
        self.send({"op": "release"})

    def close(self) -> None:
        """Hang up: a guard that still holds something thaws it."""
        if self._sock.fileno() >= 0:
            asyncio.get_running_loop().remove_reader(self._sock.fileno())
            self._sock.close()
        if self.pidfd >= 0:
            os.close(self.pidfd)
            self.pidfd = -1

    def _readable(self) -> None:
        """Take all that has come: a frozen file system waits for the last of it."""
        while True:
            try:
                message, _ = protocol.receive(self._sock)
            except BlockingIOError:
                return
            except (OSError, ValueError):
                message = None
            self._messages.put_nowait(message or {"event": "lost"})
            if message is None:
                asyncio.get_running_loop().remove_reader(self._sock.fileno())
                return
