"""One connected peer and what it may do: read, decode, dispatch, write.

Requests of one peer run one after another, in order, as qemu-ga's clients expect; peers do not wait for each other.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

from ballast.guest.dispatch import Table
from ballast.guest.linux import malloc
from ballast.wire.message import LINE_LIMIT_BYTES, Decoder, Event

log = logging.getLogger(__name__)

_READ_BYTES = 1 << 16
_TIDY_S = 1.0
_FAIR_SHARE = 32  # quick requests in a row, before the other peers are looked at


@dataclass(frozen=True, slots=True)
class Bounds:
    """How much a peer may leave unread before it is dropped, and for how long."""

    queue_bytes: int
    write_timeout_s: float


class Peer:
    """A connection. ``resources`` holds what ends with it: subscriptions, triggers, timers."""

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        *,
        origin: str,
        authenticated: bool,
        table: Table,
        bounds: Bounds,
    ) -> None:
        self.origin = origin
        self.authenticated = authenticated
        self.failed_tokens = 0
        self.resources = contextlib.ExitStack()
        self._reader = reader
        self._writer = writer
        self._table = table
        self._bounds = bounds
        self._last_reply = False
        self._reply_bytes = 0

    async def serve(self) -> None:
        """Answer requests until the peer goes, is dropped or this task is cancelled.

        A peer that reads no more keeps its place until it is dropped: what it holds of ours stays bounded.
        """
        try:
            with self.resources:
                await self._answer_all()
            self._writer.close()
            async with asyncio.timeout(self._bounds.write_timeout_s):
                await self._writer.wait_closed()
        except TimeoutError:
            log.warning("%s does not read its answers, dropped", self.origin)
            self.drop()
        except (OSError, EOFError) as error:
            log.debug("%s went away: %s", self.origin, error)
        except Exception:  # a bug in one peer's handling must not end the others
            log.exception("%s: internal error, dropped", self.origin)
            self.drop()
        finally:
            self._writer.close()

    def deliver(self, event: Event) -> bool:
        """Queue an event; a peer that has too much unread is dropped. Never waits."""
        transport = self._writer.transport
        if transport.is_closing():
            return False
        if transport.get_write_buffer_size() > self._bounds.queue_bytes + self._reply_bytes:
            log.warning("%s does not read its events, dropped", self.origin)
            self.drop()
            return False
        self._writer.write(event.encode())
        return True

    def drop(self) -> None:
        """End the connection, without regard for what it has not read; what it still asks is not done."""
        self._last_reply = True
        self._writer.transport.abort()

    def close_after_reply(self) -> None:
        """End the connection once the command that runs now is answered."""
        self._last_reply = True

    async def _answer_all(self) -> None:
        decoder = Decoder(LINE_LIMIT_BYTES)
        while data := await self._reader.read(_READ_BYTES):
            for number, value in enumerate(decoder.feed(data), 1):
                reply = await self._table.answer(value, self)
                encoded = reply.encode()
                self._reply_bytes = len(encoded)  # a large one in flight is no sign of a peer that does not read
                self._writer.write(encoded)
                await self._flush()
                self._reply_bytes = 0
                if self._last_reply:
                    return
                if number % _FAIR_SHARE == 0:
                    await asyncio.sleep(0)  # the other peers' turn

    async def _flush(self) -> None:
        if self._writer.transport.get_write_buffer_size():
            async with asyncio.timeout(self._bounds.write_timeout_s):
                await self._writer.drain()


class Peers:
    """All peers of the agent, from every transport."""

    def __init__(self, table: Table, bounds: Bounds, *, most: int) -> None:
        self._table = table
        self._bounds = bounds
        self._most = most
        self._peers: set[Peer] = set()
        self._tidying: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        """How many are connected."""
        return len(self._peers)

    async def serve(
        self,
        connections: AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]],
        describe: Callable[[asyncio.StreamWriter], tuple[str, bool]],
    ) -> None:
        """Serve each connection until this task is cancelled; ``describe`` gives (origin, authenticated)."""
        async with asyncio.TaskGroup() as group:
            async for reader, writer in connections:
                origin, authenticated = describe(writer)
                if len(self._peers) >= self._most:
                    log.warning("%s turned away: %d peers are connected", origin, len(self._peers))
                    writer.transport.abort()
                    continue
                peer = Peer(
                    reader, writer, origin=origin, authenticated=authenticated, table=self._table, bounds=self._bounds
                )
                group.create_task(self._serve_one(peer))

    async def _serve_one(self, peer: Peer) -> None:
        self._peers.add(peer)
        try:
            await peer.serve()
        finally:
            self._peers.discard(peer)
            if self._tidying is None:
                self._tidying = asyncio.get_running_loop().call_later(_TIDY_S, self._tidy)

    def _tidy(self) -> None:
        """Give back what those who went have left: cycles of theirs would wait long for so idle a process."""
        self._tidying = None
        gc.collect()
        malloc.trim()
