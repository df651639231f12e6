"""A bus that does what a real one never should: the bare protocol, on a socket."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import Any, Self

from dbus_next import MessageType, Variant
from dbus_next._private.marshaller import Marshaller

_PATH, _INTERFACE, _MEMBER, _ERROR_NAME, _REPLY_SERIAL, _SENDER, _SIGNATURE = 1, 2, 3, 4, 5, 7, 8


def frame(kind: MessageType, fields: dict[int, Any], body: bytes = b"", *, flags: int = 0) -> bytes:
    """A message as the bus passes it on: the library's own has no sender."""
    marshalled = Marshaller(
        "yyyyuua(yv)", [ord("l"), kind.value, flags, 1, len(body), 1, list(map(list, fields.items()))]
    )
    header = bytes(marshalled.marshall())
    return header + bytes(-len(header) % 8) + body


def call(interface: str, member: str, path: str, *, signature: str = "", body: bytes = b"", flags: int = 0) -> bytes:
    """A method call from a stranger."""
    fields = {
        _PATH: Variant("o", path),
        _INTERFACE: Variant("s", interface),
        _MEMBER: Variant("s", member),
        _SENDER: Variant("s", ":1.7"),
    }
    if signature:
        fields[_SIGNATURE] = Variant("g", signature)
    return frame(MessageType.METHOD_CALL, fields, body, flags=flags)


def signal(signature: str, body: bytes) -> bytes:
    """A signal that nobody asked for."""
    fields = {
        _PATH: Variant("o", "/"),
        _INTERFACE: Variant("s", "a.b"),
        _MEMBER: Variant("s", "C"),
        _SENDER: Variant("s", ":1.7"),
        _SIGNATURE: Variant("g", signature),
    }
    return frame(MessageType.SIGNAL, fields, body)


def owner_changed(name: str, owner: str, sender: str = "org.freedesktop.DBus") -> bytes:
    """What the bus tells of a name: whose it was leaves open, whose it is is ``owner``."""
    fields = {
        _PATH: Variant("o", "/org/freedesktop/DBus"),
        _INTERFACE: Variant("s", "org.freedesktop.DBus"),
        _MEMBER: Variant("s", "NameOwnerChanged"),
        _SENDER: Variant("s", sender),
        _SIGNATURE: Variant("g", "sss"),
    }
    return frame(MessageType.SIGNAL, fields, bytes(Marshaller("sss", [name, "", owner]).marshall()))


def answer(serial: int, number: int, sender: str = "org.freedesktop.DBus") -> bytes:
    """The answer "u" to the message with that number."""
    fields = {_REPLY_SERIAL: Variant("u", serial), _SENDER: Variant("s", sender), _SIGNATURE: Variant("g", "u")}
    return frame(MessageType.METHOD_RETURN, fields, number.to_bytes(4, "little"))


class FakeBus:
    """Listens at ``path``; ``connections`` are those that came, one after another."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.connections: asyncio.Queue[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = asyncio.Queue()
        self._writers: list[asyncio.StreamWriter] = []

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_unix_server(self._take, self.path)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for writer in self._writers:
            writer.transport.abort()
        with contextlib.suppress(FileNotFoundError):
            self.path.unlink()

    async def accept(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """The next connection, before its first byte."""
        return await self.connections.get()

    async def accept_and_name(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """The next connection, let in and given its name."""
        reader, writer = await self.accept()
        await reader.readuntil(b"\r\n")
        writer.write(b"OK 0123456789abcdef0123456789abcdef\r\n")
        await reader.readuntil(b"BEGIN\r\n")
        writer.write(answer(2, 1))  # Hello is the first, RequestName the second; what Hello brings nobody reads
        return reader, writer

    def _take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.append(writer)
        self.connections.put_nowait((reader, writer))
