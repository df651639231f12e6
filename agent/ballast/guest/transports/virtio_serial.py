"""virtio-serial ports: drivers/char/virtio_console.c (read for Linux 6.1 and 6.12).

A port knows no connections: without a host reader ``read`` returns nothing for ever and ``poll`` says hang-up for
ever. So the port is watched edge-triggered, in an epoll of its own: the driver wakes its queue when the host comes,
goes or sends, and between those nothing of ours runs. The port stays open all the time, since opening and closing it
is what QEMU tells libvirt as "agent connected". A session begins with the host's first byte and ends when it goes.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import select
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

_READ_BYTES = 1 << 16
_HIGH_WATER_BYTES, _LOW_WATER_BYTES = 1 << 16, 1 << 14
_BUSY_RETRY_S = 1.0
# The driver hears of a host that comes from another queue than its data, and later: the first bytes can be followed by
# an end of file that is none. An end behind data counts when it still stands after this.
_GONE_GRACE_S = 0.5

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


def find_port(name: str, root: Path = Path("/")) -> Path | None:
    """Return the device node of the port ``name``, or None while there is no such port."""
    for port in sorted((root / "sys/class/virtio-ports").glob("*")):
        with contextlib.suppress(OSError):
            if (port / "name").read_text().rstrip("\n") == name:
                return root / "dev" / port.name
    return None


async def accept(find: Callable[[], Path | None], changed: Callable[[], Awaitable[Any]]) -> AsyncIterator[Streams]:
    """Yield a session each time a host begins to talk on the port that ``find`` finds.

    ``changed`` waits for the next uevent of a virtio port; it is how we learn that an absent port has come.
    """
    while True:
        path = find()
        try:
            port = _Port(path) if path else None
        except OSError as error:
            port = None
            if error.errno == errno.EBUSY:  # another program has it, and tells nobody when it lets go
                await asyncio.sleep(_BUSY_RETRY_S)
                continue
        if port is None:
            await changed()
            continue
        try:
            while (session := await port.sessions.get()) is not None:
                yield session
        finally:
            port.close()


class _Port:
    """An open port: moves bytes between the device and the session of the moment."""

    def __init__(self, path: Path) -> None:
        self.sessions: asyncio.Queue[Streams | None] = asyncio.Queue()
        self._fd = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        self._session: _Session | None = None
        self._doubt: asyncio.TimerHandle | None = None
        self._epoll = select.epoll()
        self._epoll.register(self._fd, select.EPOLLIN | select.EPOLLOUT | select.EPOLLET)
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._epoll.fileno(), self._woken)

    def close(self) -> None:
        self._loop.remove_reader(self._epoll.fileno())
        self._epoll.close()
        self._end_session()
        os.close(self._fd)
        self._fd = -1  # a resumed session may still call read()

    def write(self, data: bytes | bytearray) -> int:
        """Write what fits now; 0 if nothing does or the host is gone."""
        try:
            return os.write(self._fd, data)
        except OSError:
            return 0

    def end(self, session: _Session) -> None:
        """Forget a session that was closed on our side; the host's next byte begins another."""
        if self._session is session:
            self._session = None

    def _woken(self) -> None:
        self._epoll.poll(0)
        if self._session is not None:
            self._session.flush()
        self.read()

    def read(self) -> None:
        """Hand on all that is there, unless the session asked for a pause."""
        is_first = True
        while self._session is None or not self._session.paused:
            try:
                data = os.read(self._fd, _READ_BYTES)
            except BlockingIOError:
                self._dispel_doubt()
                return
            except OSError:  # ENODEV: unplugged
                self._end_session()
                self.sessions.put_nowait(None)
                return
            if not data:
                self._host_seems_gone(for_sure=is_first)
                return
            is_first = False
            if self._session is None:
                self._session = _Session(self)
                self.sessions.put_nowait(self._session.streams)
            self._session.protocol.data_received(data)

    def _host_seems_gone(self, *, for_sure: bool) -> None:
        if self._doubt is None and for_sure:
            self._end_session()
        elif self._doubt is None or not for_sure:
            self._dispel_doubt()
            self._doubt = self._loop.call_later(_GONE_GRACE_S, self._look_again)

    def _look_again(self) -> None:
        self._doubt = None
        self.read()

    def _dispel_doubt(self) -> None:
        if self._doubt is not None:
            self._doubt.cancel()
            self._doubt = None

    def _end_session(self) -> None:
        self._dispel_doubt()
        if self._session is not None:
            self._session.abort()


class _Session(asyncio.Transport):
    """A transport for asyncio's streams, as long as one host talks."""

    def __init__(self, port: _Port) -> None:
        super().__init__()
        self.paused = False
        self._port = port
        self._buffer = bytearray()
        self._closing = False
        self._full = False
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader(loop=loop)
        self.protocol = asyncio.StreamReaderProtocol(reader, loop=loop)
        self.protocol.connection_made(self)
        self.streams: Streams = (reader, asyncio.StreamWriter(self, self.protocol, reader, loop))

    def is_closing(self) -> bool:
        return self._closing

    def is_reading(self) -> bool:
        return not self.paused

    def pause_reading(self) -> None:
        self.paused = True

    def resume_reading(self) -> None:
        self.paused = False
        asyncio.get_running_loop().call_soon(self._port.read)

    def get_write_buffer_size(self) -> int:
        return len(self._buffer)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if self._closing:
            return
        self._buffer += data
        self.flush()

    def flush(self) -> None:
        """Write on until the port takes no more."""
        while self._buffer and (written := self._port.write(self._buffer)):
            del self._buffer[:written]
        if not self._full and len(self._buffer) > _HIGH_WATER_BYTES:
            self._full = True
            self.protocol.pause_writing()
        elif self._full and len(self._buffer) < _LOW_WATER_BYTES:
            self._full = False
            self.protocol.resume_writing()

    def close(self) -> None:
        self.abort()

    def abort(self) -> None:
        if self._closing:
            return
        self._closing = True
        self._buffer.clear()
        self._port.end(self)
        asyncio.get_running_loop().call_soon(self.protocol.connection_lost, None)
