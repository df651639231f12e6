"""The system bus: a place on which the agent is called and tells, and that may go and come back at any time.

Nobody waits for it but who came through it: what is sent is written without waiting, into a bounded buffer, and while
a file system is frozen no connection is made.

The only file that imports the D-Bus library (its fork dbus-fast has the same names), and it takes no more than the
form of messages from it. dbus-next's own connection lets any user of the guest hold the agent up: it connects
blocking, spins when the bus goes away during authentication, reads without a pause for as long as somebody sends,
decodes whatever comes in full, queues without a bound, and does not tell a method who calls it.
D-Bus Specification 0.43, "Message Protocol" and "Authentication Protocol".
"""

from __future__ import annotations

import asyncio
import io
import itertools
import logging
import os
import struct
from collections.abc import Callable
from typing import Any

from dbus_next import Message as Message
from dbus_next import MessageFlag, SignatureTree
from dbus_next import MessageType as MessageType
from dbus_next import Variant as Variant
from dbus_next._private.unmarshaller import Unmarshaller

log = logging.getLogger(__name__)

SYSTEM_BUS_PATH = "/run/dbus/system_bus_socket"
BODY_LIMIT_BYTES = 1 << 16
QUEUE_BYTES = 1 << 18  # unsent; more, and the bus does not read
ANSWER_S = 10.0
PAUSE_MIN_S, PAUSE_MAX_S = 1.0, 60.0

_DRIVER, _DRIVER_PATH = "org.freedesktop.DBus", "/org/freedesktop/DBus"
_FIXED_BYTES = 16  # byte order, type, flags, version; lengths of body, serial number, length of the header's fields
_BODY_BYTES_AT = 4
_DO_NOT_QUEUE, _PRIMARY_OWNER = 4, 1
_FAIR_SHARE = 16  # messages in a row, before the rest of the agent is looked at
_SIGNATURES_MAX = 256


class BusError(Exception):
    """The bus itself answered with an error, or not with what was hoped for."""


class Call:
    """A method call that came in. Of what a stranger sends only the header is decoded, until somebody wants more."""

    def __init__(self, connection: _Connection, header: Message, frame: bytes | None) -> None:
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
        printable = text.encode(errors="backslashreplace").decode().replace("\0", "\\0")
        return self._reply(Message.new_error(self._header, name, printable))

    async def uid(self) -> int:
        """The caller's user, as the bus knows it. BusError, TimeoutError, ConnectionError."""
        async with asyncio.timeout(ANSWER_S):
            return int(await self._connection.ask("GetConnectionUnixUser", "s", self.sender))

    def _reply(self, message: Message) -> bool:
        if MessageFlag.NO_REPLY_EXPECTED in self._header.flags:
            return False
        return self._connection.send(message)


Handler = Callable[[Call], None]


class Bus:
    """The agent on the bus, under its name. ``run`` keeps it there; without a bus nothing is told, and that is all."""

    def __init__(self, name: str, *, is_frozen: Callable[[], bool], path: str = SYSTEM_BUS_PATH) -> None:
        self._name = name
        self._is_frozen = is_frozen
        self._path = path
        self._connection: _Connection | None = None
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
                connection = await _Connection.open(self._path)
            except (OSError, EOFError, BusError) as error:
                self._tell_lost(error)
                continue
            try:
                await self._take_name(connection, handle)
                pause_s = pause_min_s
                await connection.receive_all(handle)
            except (OSError, EOFError, BusError) as error:
                self._tell_lost(error)
            finally:
                self._connection = None
                connection.close()

    def emit(self, path: str, interface: str, member: str, signature: str, *values: Any) -> None:
        """Send a signal to whoever listens; lost without a bus. Never waits."""
        if self._connection is not None:
            self._connection.send(Message.new_signal(path, interface, member, signature, list(values)))

    async def _take_name(self, connection: _Connection, handle: Handler) -> None:
        connection.ask("Hello")
        owner = connection.ask("RequestName", "su", self._name, _DO_NOT_QUEUE)
        async with asyncio.timeout(ANSWER_S):
            while not owner.done():
                await connection.receive(handle)
        if owner.result() != _PRIMARY_OWNER:
            raise BusError(f"somebody else is {self._name}")
        self._connection = connection
        self._is_told_lost = False
        log.info("on the bus as %s", self._name)

    def _tell_lost(self, error: Exception) -> None:
        """Once for each time that it is lost: a guest without D-Bus is nothing to be told of each minute."""
        level = logging.DEBUG if self._is_told_lost else logging.INFO
        reason = "it is gone" if isinstance(error, EOFError) else str(error) or type(error).__name__
        log.log(level, "not on the bus, waiting for it: %s", reason)
        self._is_told_lost = True


class _Connection:
    """Messages both ways, over a socket on which the bus knows us by our uid."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._serials = itertools.count(1)
        self._asked: dict[int, asyncio.Future[Any]] = {}

    @classmethod
    async def open(cls, path: str) -> _Connection:
        """Connect and authenticate. OSError, EOFError, BusError."""
        async with asyncio.timeout(ANSWER_S):
            reader, writer = await asyncio.open_unix_connection(path)
            try:
                writer.write(b"\0AUTH EXTERNAL " + str(os.getuid()).encode().hex().encode() + b"\r\n")
                answer = await reader.readuntil(b"\r\n")
            except asyncio.LimitOverrunError as error:
                writer.transport.abort()
                raise BusError("the bus speaks another protocol") from error
            except BaseException:
                writer.transport.abort()
                raise
        if not answer.startswith(b"OK "):
            writer.transport.abort()
            raise BusError("the bus does not let us in")
        writer.write(b"BEGIN\r\n")
        return cls(reader, writer)

    def close(self) -> None:
        """Hang up; who still waits for an answer gets ConnectionResetError."""
        self._writer.transport.abort()
        for asked in list(self._asked.values()):
            if not asked.done():
                asked.set_exception(ConnectionResetError("the bus is gone"))
                asked.exception()  # seen: it is no fault if nobody waits

    def send(self, message: Message) -> bool:
        """Queue a message; a bus that has too much unread is left. Never waits."""
        transport = self._writer.transport
        if transport.is_closing():
            return False
        if transport.get_write_buffer_size() > QUEUE_BYTES:
            log.warning("the bus does not read, left")
            transport.abort()
            return False
        message.serial = next(self._serials)
        self._writer.write(bytes(message._marshall(False)))
        return True

    def ask(self, member: str, signature: str = "", *values: Any) -> asyncio.Future[Any]:
        """Ask the bus itself; the future brings the answer's first value, BusError or ConnectionError."""
        asked: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        question = Message(_DRIVER, _DRIVER_PATH, _DRIVER, member, signature=signature, body=list(values))
        if not self.send(question):
            raise ConnectionResetError("the bus is gone")
        serial = question.serial
        self._asked[serial] = asked
        asked.add_done_callback(lambda _: self._asked.pop(serial, None))
        return asked

    async def receive_all(self, handle: Handler) -> None:
        """Take in messages until the bus is gone, and no faster than it takes the answers. OSError, EOFError."""
        for number in itertools.count(1):
            await self.receive(handle)
            if self._writer.transport.get_write_buffer_size():
                async with asyncio.timeout(ANSWER_S):
                    await self._writer.drain()
            if number % _FAIR_SHARE == 0:
                await asyncio.sleep(0)

    async def receive(self, handle: Handler) -> None:
        """Take in one message."""
        fixed = await self._reader.readexactly(_FIXED_BYTES)
        body_bytes, fields_bytes = struct.unpack("<4xI4xI" if fixed[:1] == b"l" else ">4xI4xI", fixed)
        fields_bytes += -fields_bytes % 8
        if fields_bytes > BODY_LIMIT_BYTES:
            await self._skip(fields_bytes + body_bytes)
            return
        fields = await self._reader.readexactly(fields_bytes)
        frame = None
        if body_bytes <= BODY_LIMIT_BYTES:
            frame = fixed + fields + await self._reader.readexactly(body_bytes)
        else:
            await self._skip(body_bytes)
        # With a body of no bytes it is the header alone.
        header = decode(fixed[:_BODY_BYTES_AT] + bytes(4) + fixed[_BODY_BYTES_AT + 4 :] + fields)
        if header is None:
            return
        if header.message_type is MessageType.METHOD_CALL:
            handle(Call(self, header, frame))
        elif header.sender == _DRIVER and header.reply_serial in self._asked:
            self._settle(self._asked[header.reply_serial], frame)

    def _settle(self, asked: asyncio.Future[Any], frame: bytes | None) -> None:
        message = decode(frame) if frame is not None else None
        if asked.done() or message is None:
            return
        value = message.body[0] if message.body else None
        if message.message_type is MessageType.METHOD_RETURN:
            asked.set_result(value)
        else:
            asked.set_exception(BusError(f"{message.error_name}: {value}"))
            asked.exception()  # seen, as above

    async def _skip(self, count_bytes: int) -> None:
        while count_bytes:
            count_bytes -= len(await self._reader.readexactly(min(count_bytes, BODY_LIMIT_BYTES)))


def decode(frame: bytes) -> Message | None:
    """Read a whole message; None for one that the library cannot read: the next one may be better."""
    # It remembers each signature that it ever saw, and strangers choose them.
    if len(SignatureTree._cache) > _SIGNATURES_MAX:
        SignatureTree._cache.clear()
    try:
        message: Message | None = Unmarshaller(io.BytesIO(frame)).unmarshall()
    except Exception as error:  # noqa: BLE001 - the library raises whatever comes up; the bus checks what it passes on
        log.debug("a message that cannot be read, ignoring: %r", error)
        return None
    return message
