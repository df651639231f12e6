"""Peers served on a UNIX socket, as the daemon does it, and a client of it."""

from __future__ import annotations

import asyncio
import contextlib
import json
from pathlib import Path
from typing import Any

from ballast.guest.dispatch import Table
from ballast.guest.peer import Bounds, Peers
from ballast.guest.transports import unix
from ballast.wire.message import LINE_LIMIT_BYTES

DEADLINE_S = 10
BOUNDS = Bounds(queue_bytes=1 << 14, write_timeout_s=0.2)


class Client:
    """The other end."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def send(self, execute: str, **arguments: Any) -> None:
        self.writer.write(json.dumps({"execute": execute, "arguments": arguments}).encode() + b"\n")

    async def receive(self) -> Any:
        async with asyncio.timeout(DEADLINE_S):
            return json.loads(await self.reader.readline())

    async def ask(self, execute: str, **arguments: Any) -> Any:
        self.send(execute, **arguments)
        return (await self.receive())["return"]

    async def wait_gone(self) -> None:
        """Read whatever comes until the other side has hung up."""
        with contextlib.suppress(ConnectionError):
            async with asyncio.timeout(DEADLINE_S):
                while await self.reader.read(1 << 20):
                    pass


class Served:
    """Peers served on a UNIX socket, as the daemon does it."""

    def __init__(self, folder: Path, table: Table, *, most: int = 8, authenticated: bool = True) -> None:
        self.peers = Peers(table, BOUNDS, most=most)
        self.path = folder / "agent.sock"
        self.stack = contextlib.AsyncExitStack()
        listener = self.stack.enter_context(unix.listen(self.path))
        self.task = asyncio.create_task(self.peers.serve(unix.accept(listener), lambda _: ("test", authenticated)))

    async def connect(self) -> Client:
        reader, writer = await asyncio.open_unix_connection(str(self.path), limit=2 * LINE_LIMIT_BYTES)
        self.stack.callback(writer.transport.abort)
        return Client(reader, writer)

    async def wait_peers(self, count: int) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while len(self.peers) != count:  # noqa: ASYNC110 - nobody tells of it
                await asyncio.sleep(0.001)

    async def close(self) -> None:
        self.task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self.task
        await self.stack.aclose()
