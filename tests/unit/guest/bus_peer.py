"""Somebody else on the bus, who answers what a test wants."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from ballast.guest.bus_connection import DRIVER, DRIVER_PATH, Connection, Message, decode

Answer = tuple[str, list[Any]]


class Peer:
    """``name`` is its own.

    Each call is put into ``asked``, told to ``hear`` and gets ``answers[member]``, else ``answer``.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.name = ""
        self.asked: asyncio.Queue[Message] = asyncio.Queue()
        self.answer: Answer = ("", [])
        self.answers: dict[str, Answer] = {}
        self.error = ""
        self.is_silent = False
        self.hear: Callable[[str], None] = lambda _: None

    async def __aenter__(self) -> Self:
        self._connection = await Connection.open(str(self._path))
        named = self._connection.ask("Hello")
        self._reading = asyncio.create_task(self._connection.receive_all(self._take))
        self.name = (await named).body[0]
        return self

    async def __aexit__(self, *_: object) -> None:
        self.leave()
        with contextlib.suppress(OSError, EOFError, asyncio.CancelledError):
            await self._reading

    def leave(self) -> None:
        """Hang up."""
        self._connection.close()

    async def monitor(self) -> None:
        """From now on take in every call on the bus, whoever makes it, and be silent."""
        self.is_silent = True
        body: list[Any] = [["type='method_call'"], 0]
        interface = "org.freedesktop.DBus.Monitoring"
        message = Message(DRIVER, DRIVER_PATH, interface, "BecomeMonitor", signature="asu", body=body)
        await self._connection.call(message)

    async def take(self, count: int) -> list[str]:
        """Wait until it was called that many times more; the members."""
        return [str((await self.asked.get()).member) for _ in range(count)]

    async def call(self, interface: str, path: str, member: str, signature: str, *values: Any) -> list[Any]:
        """Call the agent. BusError."""
        # Answers are taken from a unique name only.
        owner = (await self._connection.ask("GetNameOwner", "s", "org.ballast.Agent1")).body[0]
        message = Message(owner, path, interface, member, signature=signature, body=list(values))
        return list((await self._connection.call(message)).body)

    def _take(self, header: Message, frame: bytes | None) -> None:
        assert frame is not None
        message = decode(frame)
        assert message is not None
        self.asked.put_nowait(message)
        self.hear(str(message.member))
        if self.is_silent:
            return
        if self.error:
            self._connection.send(Message.new_error(message, self.error, "no, not now"))
        else:
            signature, body = self.answers.get(str(message.member), self.answer)
            self._connection.send(Message.new_method_return(message, signature, body))
