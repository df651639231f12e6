"""The system bus: a place on which the agent is called and calls, and that may go and come back at any time.

Nobody waits for it but who came through it or is asked by it: what is sent is written without waiting, into a bounded
buffer, and while a file system is frozen no connection is made.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

from ballast.guest import bus_connection
from ballast.guest.bus_connection import BODY_LIMIT_BYTES as BODY_LIMIT_BYTES
from ballast.guest.bus_connection import BusError as BusError
from ballast.guest.bus_connection import Connection
from ballast.guest.bus_connection import Message as Message
from ballast.guest.bus_connection import MessageFlag as MessageFlag
from ballast.guest.bus_connection import MessageType as MessageType
from ballast.guest.bus_connection import Variant as Variant
from ballast.guest.bus_connection import decode as decode

log = logging.getLogger(__name__)

SYSTEM_BUS_PATH = "/run/dbus/system_bus_socket"
PAUSE_MIN_S, PAUSE_MAX_S = 1.0, 60.0

_DO_NOT_QUEUE, _PRIMARY_OWNER = 4, 1


class Call:
    """A method call that came in. Of what a stranger sends only the header is decoded, until somebody wants more."""

    def __init__(self, connection: Connection, header: Message, frame: bytes | None) -> None:
        self.sender = str(header.sender)
        self.path = header.path
        self.interface = header.interface
        self.member = header.member
        self.signature = header.signature
        self._connection = connection
        self._header = header
        self._frame = frame

    def arguments(self) -> list[Any]:
        """What it carries, of the types in ``signature``. ValueError if that is too long or no proper message."""
        if self._frame is None:
            raise ValueError(f"the arguments are longer than {BODY_LIMIT_BYTES} bytes")
        message = decode(self._frame)
        if message is None:
            raise ValueError("the arguments are malformed")
        return list(message.body)

    def answer(self, signature: str = "", *values: Any) -> bool:
        """Return values to the caller; False if nobody can get them. Never waits."""
        return self._reply(Message.new_method_return(self._header, signature, list(values)))

    def refuse(self, name: str, text: str) -> bool:
        """Answer with an error; never waits."""
        return self._reply(Message.new_error(self._header, name, printable(text)))

    async def uid(self) -> int:
        """The caller's user, as the bus knows it. BusError, TimeoutError, ConnectionError."""
        async with asyncio.timeout(bus_connection.ANSWER_S):
            return int((await self._connection.ask("GetConnectionUnixUser", "s", self.sender)).body[0])

    def _reply(self, message: Message) -> bool:
        if MessageFlag.NO_REPLY_EXPECTED in self._header.flags:
            return False
        return self._connection.send(message)


Handler = Callable[[Call], None]


def printable(text: str) -> str:
    """What D-Bus can carry of a text: no NUL, and nothing that is not UTF-8."""
    return text.encode(errors="backslashreplace").decode().replace("\0", "\\0")


class Bus:
    """The agent on the bus, under its name. ``run`` keeps it there; without a bus nothing is told, and that is all."""

    def __init__(self, name: str, *, is_frozen: Callable[[], bool], path: str = SYSTEM_BUS_PATH) -> None:
        self._name = name
        self._is_frozen = is_frozen
        self._path = path
        self._connection: Connection | None = None
        self._connected = asyncio.Event()
        self._is_told_lost = False

    async def run(self, handle: Handler, *, pause_min_s: float = PAUSE_MIN_S) -> None:
        """Connect, hand each call to ``handle``, and connect again, until cancelled. ``handle`` must not block.

        A bus that is not there is looked for again after a second, then less and less often, down to once a minute.
        """
        pause_s = 0.0
        while True:
            await asyncio.sleep(pause_s)
            pause_s = min(max(2 * pause_s, pause_min_s), PAUSE_MAX_S)
            if self._is_frozen():  # connecting asks the bus, and may ask PID 1 to start it
                continue
            try:
                connection = await Connection.open(self._path)
            except (OSError, EOFError, BusError) as error:
                self._tell_lost(error)
                continue
            try:
                await self._stay(connection, handle)
            except (OSError, EOFError, BusError) as error:
                if self._connection is not None:
                    pause_s = pause_min_s
                self._tell_lost(error)
            finally:
                self._connection = None
                self._connected.clear()
                connection.close()

    def emit(self, path: str, interface: str, member: str, signature: str, *values: Any) -> None:
        """Send a signal to whoever listens; lost without a bus. Never waits."""
        if self._connection is not None:
            self._connection.send(Message.new_signal(path, interface, member, signature, list(values)))

    @property
    def id(self) -> str:
        """Of this bus, until it ends: a unique name means somebody else on another. Empty while there is none."""
        return self._connection.bus_id if self._connection is not None else ""

    async def wait_connected(self) -> asyncio.Future[None]:
        """Wait for a bus; the future is done when that connection to it has ended."""
        while self._connection is None:
            await self._connected.wait()
        return self._connection.lost

    async def watch(self, name: str) -> asyncio.Future[None]:
        """A future that is done when the unique name ``name`` has left the bus, and cancelled when we have.

        BusError if it has left already, TimeoutError, ConnectionError.
        """
        return await self._connection_now().watch(name)

    async def call(
        self,
        destination: str,
        path: str,
        interface: str,
        member: str,
        signature: str = "",
        *values: Any,
        returns: str = "",
        timeout_s: float,
    ) -> list[Any]:
        """Call a method of the unique name ``destination``; the values that it returns, of the types in ``returns``.

        BusError with the name of the error, or without if it returns other types; TimeoutError, ConnectionError.
        A call that could not be sent raises before it waits. Not while a file system is frozen.
        """
        message = Message(destination, path, interface, member, signature=signature, body=list(values))
        asked = self._connection_now().call(message)
        async with asyncio.timeout(timeout_s):
            answer = await asked
        if answer.signature != returns:
            raise BusError(f"{member} returns {returns or 'nothing'!r}, not {answer.signature!r}")
        return list(answer.body)

    def _connection_now(self) -> Connection:
        if self._connection is None:
            raise ConnectionResetError("there is no bus")
        return self._connection

    async def _stay(self, connection: Connection, handle: Handler) -> None:
        def receive(header: Message, frame: bytes | None) -> None:
            handle(Call(connection, header, frame))

        connection.ask("Hello")
        owner = connection.ask("RequestName", "su", self._name, _DO_NOT_QUEUE)
        async with asyncio.timeout(bus_connection.ANSWER_S):
            while not owner.done():
                await connection.receive(receive)
        if owner.result().body != [_PRIMARY_OWNER]:
            raise BusError(f"somebody else is {self._name}")
        self._connection = connection
        self._connected.set()
        self._is_told_lost = False
        log.info("on the bus as %s", self._name)
        await connection.receive_all(receive)

    def _tell_lost(self, error: Exception) -> None:
        """Once for each time that it is lost: a guest without D-Bus is nothing to be told of each minute."""
        level = logging.DEBUG if self._is_told_lost else logging.INFO
        reason = "it is gone" if isinstance(error, EOFError) else str(error) or type(error).__name__
        log.log(level, "not on the bus, waiting for it: %s", reason)
        self._is_told_lost = True
