"""One connection to a message bus: messages both ways, and what was asked over it.

The only file that imports the D-Bus library (its fork dbus-fast has the same names), and it takes no more than the
form of messages from it. dbus-next's own connection lets any user of the guest hold the agent up: it connects
blocking, spins when the bus goes away during authentication, reads without a pause for as long as somebody sends,
decodes whatever comes in full, queues without a bound, and does not tell a method who calls it.
D-Bus Specification 0.43, "Message Protocol", "Authentication Protocol" and "Message Bus Specification".
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
from dbus_next import MessageFlag as MessageFlag
from dbus_next import MessageType as MessageType
from dbus_next import SignatureTree
from dbus_next import Variant as Variant
from dbus_next._private.unmarshaller import Unmarshaller

log = logging.getLogger(__name__)

BODY_LIMIT_BYTES = 1 << 16
QUEUE_BYTES = 1 << 18  # unsent; more, and the bus does not read
ANSWER_S = 10.0

DRIVER, DRIVER_PATH = "org.freedesktop.DBus", "/org/freedesktop/DBus"
_FIXED_BYTES = 16  # byte order, type, flags, version; lengths of body, serial number, length of the header's fields
_BODY_BYTES_AT = 4
_FAIR_SHARE = 16  # messages in a row, before the rest of the agent is looked at
_SIGNATURES_MAX = 256

# A method call's header, and its whole frame unless that is too long.
Receiver = Callable[[Message, bytes | None], None]


class BusError(Exception):
    """Who was asked answered with an error, whose ``name`` is the bus's or its own, or not with what was hoped for."""

    def __init__(self, text: str, name: str = "") -> None:
        super().__init__(f"{name}: {text}" if name else text)
        self.text = text
        self.name = name


class Connection:
    """Messages both ways, over a socket on which the bus knows us by our uid. ``bus_id`` is another for each bus."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, bus_id: str) -> None:
        self.bus_id = bus_id
        self.lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._reader = reader
        self._writer = writer
        self._serials = itertools.count(1)
        self._asked: dict[int, tuple[str, asyncio.Future[Message]]] = {}
        self._watched: dict[str, asyncio.Future[None]] = {}

    @classmethod
    async def open(cls, path: str) -> Connection:
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
        return cls(reader, writer, answer[3:].strip().decode(errors="replace"))

    def close(self) -> None:
        """Hang up; who still waits for an answer gets ConnectionResetError, and who watches a name is cancelled."""
        self._writer.transport.abort()
        if not self.lost.done():
            self.lost.set_result(None)
        for _, asked in list(self._asked.values()):
            if not asked.done():
                asked.set_exception(ConnectionResetError("the bus is gone"))
                asked.exception()  # seen: it is no fault if nobody waits
        for gone in self._watched.values():
            gone.cancel()

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

    def call(self, message: Message) -> asyncio.Future[Message]:
        """Call a method of the bus itself or of a unique name; the future brings its answer.

        Or BusError, ConnectionError. Nobody else can answer. Forgotten when the future is done or cancelled.
        """
        asked: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        if not self.send(message):
            raise ConnectionResetError("the bus is gone")
        serial = message.serial
        self._asked[serial] = (message.destination, asked)
        asked.add_done_callback(lambda _: self._asked.pop(serial, None))
        return asked

    def ask(self, member: str, signature: str = "", *values: Any) -> asyncio.Future[Message]:
        """Ask the bus itself."""
        return self.call(Message(DRIVER, DRIVER_PATH, DRIVER, member, signature=signature, body=list(values)))

    async def watch(self, name: str) -> asyncio.Future[None]:
        """A future that is done when the unique name ``name`` has left the bus, and cancelled when we have.

        BusError if it has left already, TimeoutError, ConnectionError. Rules for names that left are taken back here,
        not when they leave: that may be while file systems are frozen, and the bus must not be spoken to.
        """
        for left in [name for name, gone in self._watched.items() if gone.done()]:
            del self._watched[left]
            self.ask("RemoveMatch", "s", _departure(left))
        async with asyncio.timeout(ANSWER_S):
            gone = await self._watch_anew(name) if name not in self._watched else self._watched[name]
            (is_there,) = (await self.ask("NameHasOwner", "s", name)).body
        if not is_there and not gone.done():
            gone.set_result(None)
        if gone.done():
            raise BusError(f"{name} has left the bus")
        return gone

    async def _watch_anew(self, name: str) -> asyncio.Future[None]:
        gone = self._watched[name] = asyncio.get_running_loop().create_future()
        try:
            await self.ask("AddMatch", "s", _departure(name))
        except BaseException:
            gone.cancel()
            raise
        return gone

    async def receive_all(self, handle: Receiver) -> None:
        """Take in messages until the bus is gone, and no faster than it takes the answers. OSError, EOFError."""
        for number in itertools.count(1):
            await self.receive(handle)
            if self._writer.transport.get_write_buffer_size():
                async with asyncio.timeout(ANSWER_S):
                    await self._writer.drain()
            if number % _FAIR_SHARE == 0:
                await asyncio.sleep(0)

    async def receive(self, handle: Receiver) -> None:
        """Take in one message; ``handle`` gets it if it is a call."""
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
            handle(header, frame)
        elif header.message_type is MessageType.SIGNAL:
            if header.sender == DRIVER and header.member == "NameOwnerChanged":
                self._hear_departure(frame)
        elif header.reply_serial in self._asked:
            whom, asked = self._asked[header.reply_serial]
            # The bus speaks for those who are gone, and where its policy forbids the call.
            if header.sender == whom or (header.sender == DRIVER and header.message_type is MessageType.ERROR):
                _settle(asked, frame)

    def _hear_departure(self, frame: bytes | None) -> None:
        message = decode(frame) if frame is not None else None
        if message is None or message.signature != "sss":
            return
        name, _, owner = message.body
        gone = self._watched.get(name)
        if gone is not None and not owner and not gone.done():
            gone.set_result(None)

    async def _skip(self, count_bytes: int) -> None:
        while count_bytes:
            count_bytes -= len(await self._reader.readexactly(min(count_bytes, BODY_LIMIT_BYTES)))


def _settle(asked: asyncio.Future[Message], frame: bytes | None) -> None:
    if asked.done():
        return
    message = decode(frame) if frame is not None else None
    if message is not None and message.message_type is MessageType.METHOD_RETURN:
        asked.set_result(message)
        return
    if message is None:
        error = BusError(f"an answer that is malformed or longer than {BODY_LIMIT_BYTES} bytes")
    else:
        error = BusError(str(message.body[0]) if message.body else "", str(message.error_name))
    asked.set_exception(error)
    asked.exception()  # seen: it is no fault if nobody waits


def _departure(name: str) -> str:
    return f"type='signal',sender='{DRIVER}',member='NameOwnerChanged',arg0='{name}',arg2=''"


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
