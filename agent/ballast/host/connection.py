"""One connection to an agent: calls and their answers, events beside them, and the end of it.

Every call has a deadline. When the connection is lost, every waiting call raises PeerGone at once. What is asked and
answered is the business of ``agent``.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import secrets
from collections.abc import AsyncIterator
from typing import Any, Self

from ballast.host.connect import NoAnswer, PeerGone, open_streams, parse_target
from ballast.wire.errors import AgentError, BadRequest
from ballast.wire.message import (
    DELIMITER,
    LINE_LIMIT_BYTES,
    Decoder,
    Event,
    Failure,
    Reply,
    Request,
    parse_answer,
)

ANSWER_TIMEOUT_S = 10.0
SYNC_RETRY_S = 2.0
# Bounds what a peer can make grow here. 16 MiB of memory blocks are those of a guest with 32 TiB.
ANSWER_LIMIT_BYTES = 16 << 20
EVENTS_LIMIT = 1024

_READ_BYTES = 1 << 16


class NotUnderstood(AgentError):
    """The agent answered, and not as the protocol has it."""


class Connection:
    """A connection in step; made by ``connect``."""

    def __init__(self, target: str, writer: asyncio.StreamWriter, *, timeout_s: float) -> None:
        self.target = target
        self._writer = writer
        self._timeout_s = timeout_s
        self._waiting: dict[str, asyncio.Future[Any]] = {}
        self._events: asyncio.Queue[Event | None] = asyncio.Queue()
        self._gone: PeerGone | None = None
        self._in_step = False
        # On virtio-serial an answer to somebody before us can still arrive: no two connections share an id.
        self._session = secrets.token_hex(8)
        self._count = itertools.count(1)

    @classmethod
    @contextlib.asynccontextmanager
    async def connect(
        cls, target: str, token: str | None = None, timeout_s: float = ANSWER_TIMEOUT_S
    ) -> AsyncIterator[Self]:
        """Connect to a connect string, agree on where messages begin, and authenticate if there is a token.

        ``timeout_s`` is for getting there, and for each call that names none of its own.
        ValueError for a bad connect string, PeerGone, Unauthenticated.
        """
        place = parse_target(target)
        deadline_s = asyncio.get_running_loop().time() + timeout_s
        try:
            async with asyncio.timeout_at(deadline_s):
                reader, writer = await open_streams(place)
        except TimeoutError as error:
            raise NoAnswer(f"{target}: no connection within {timeout_s:g} s") from error
        except OSError as error:
            raise PeerGone(f"{target}: {error.strerror or error}") from error
        except PeerGone as error:
            raise PeerGone(f"{target}: {error.desc}") from error
        connection = cls(target, writer, timeout_s=timeout_s)
        reading = asyncio.create_task(connection._read(reader))
        try:
            await connection._sync(deadline_s)
            if token is not None:
                await connection.authenticate(token)
            yield connection
        finally:
            # No call waits here any more, so nothing unsent is missed; a flush could wait for ever.
            writer.transport.abort()
            reading.cancel()
            await asyncio.wait({reading})

    async def call(
        self, command: str, arguments: dict[str, Any] | None = None, *, timeout_s: float | None = None
    ) -> Any:
        """Run any command; JSON in, JSON out. AgentError's classes, NoAnswer, PeerGone."""
        return await self._call(Request(command, arguments or {}), timeout_s)

    async def _call(self, request: Request, timeout_s: float | None = None, *, prefix: bytes = b"") -> Any:
        timeout_s = self._timeout_s if timeout_s is None else timeout_s
        name = f"{self._session}-{next(self._count)}"
        line = Request(request.execute, request.arguments, {"id": name}).encode()
        if len(line) > LINE_LIMIT_BYTES:
            raise BadRequest(f"the request is longer than {LINE_LIMIT_BYTES} bytes")
        if self._gone:
            raise PeerGone(self._gone.desc)
        answer = self._waiting[name] = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(timeout_s):
                self._writer.write(prefix + line)
                with contextlib.suppress(OSError):  # the reading side tells of a loss
                    await self._writer.drain()
                return await answer
        except TimeoutError as error:
            raise NoAnswer(f"{self.target}: no answer to {request.execute} within {timeout_s:g} s") from error
        finally:
            del self._waiting[name]  # an answer that comes later is dropped

    async def authenticate(self, token: str) -> None:
        """Open what policy allows to this connection. Unauthenticated; the third failure closes it."""
        await self.call("ballast-authenticate", {"token": token})

    async def _sync(self, deadline_s: float) -> None:
        """Make both ends forget half a line from before us (QEMU's guest-sync-delimited, qapi-schema.json).

        "It is recommended that clients precede invocations of this command with a 0xFF byte [...] upon receipt of
        the 0xFF, the client must discard all prior data": the decoder does, and older answers match no id of ours.
        Asked again while there is time, since an agent that was just restarting lost the first.
        """
        number = secrets.randbits(32)
        request = Request("guest-sync-delimited", {"id": number})
        while True:
            left_s = max(0.0, deadline_s - asyncio.get_running_loop().time())
            try:
                answer = await self._call(request, min(left_s, SYNC_RETRY_S), prefix=DELIMITER)
            except NoAnswer:
                if left_s > SYNC_RETRY_S:
                    continue
                raise NoAnswer(f"{self.target}: connected, but no agent answers") from None
            if answer != number:
                raise NotUnderstood(f"{self.target}: guest-sync-delimited returned {answer!r}")
            return

    async def _read(self, reader: asyncio.StreamReader) -> None:
        decoder = Decoder(ANSWER_LIMIT_BYTES)
        problem = "the agent closed the connection"
        try:
            while data := await reader.read(_READ_BYTES):
                for value in decoder.feed(data):
                    self._take(value)
        except OSError as error:
            problem = f"connection lost: {error.strerror or error}"
        except asyncio.CancelledError:
            problem = "the connection was closed here"
            raise
        finally:
            self._gone = PeerGone(f"{self.target}: {problem}")
            for answer in self._waiting.values():
                if not answer.done():
                    answer.set_exception(PeerGone(self._gone.desc))
            self._keep(None)

    def _take(self, value: Any) -> None:
        try:
            message = parse_answer(value)
        except BadRequest:
            return  # a stale half line before the sync, or noise: what is owed to a call runs into its time-out
        if isinstance(message, Event):
            if self._in_step:  # before, it is of somebody's subscription before us
                self._keep(message)
            return
        name = message.echo.get("id")
        answer = self._waiting.get(name) if isinstance(name, str) else None
        if answer is None or answer.done():
            return
        self._in_step = True
        if isinstance(message, Reply):
            answer.set_result(message.value)
        elif isinstance(message, Failure):
            answer.set_exception(message.error)

    def _keep(self, event: Event | None) -> None:
        """Queue an event for ``events``; the oldest goes when nobody takes them, and ``seq`` then shows a gap."""
        if self._events.qsize() >= EVENTS_LIMIT:
            self._events.get_nowait()
        self._events.put_nowait(event)

    def take_events(self) -> list[Event]:
        """Those that have come and that nobody took yet, without waiting; in place of ``events``."""
        taken = []
        while not self._events.empty():
            if (event := self._events.get_nowait()) is None:
                self._events.put_nowait(None)
                break
            taken.append(event)
        return taken

    async def events(self) -> AsyncIterator[Event]:
        """Yield events as they come, those before the loss of the connection too; then PeerGone. One consumer."""
        while (event := await self._events.get()) is not None:
            yield event
        self._events.put_nowait(None)
        raise PeerGone(self._gone.desc if self._gone else self.target)
