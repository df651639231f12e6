"""A word before the machine sleeps, and time to act on it: a delay lock of logind's (org.freedesktop.login1, Inhibit).

systemd.inhibit(5) and org.freedesktop.login1(5): who holds the descriptor of a lock on "sleep" hears PrepareForSleep
before a suspend or hibernation, which then waits until all locks are closed, but no longer than InhibitDelayMaxSec
(5 s): that is the deadline of what is done here. The lock has a connection of its own to the bus, since descriptors
come by recvmsg(2) alone; with it both go.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import socket
import struct
from collections.abc import Awaitable, Callable

from ballast.guest.bus import BODY_LIMIT_BYTES, SYSTEM_BUS_PATH, BusError, Message, MessageFlag, MessageType, decode
from ballast.wire.errors import AgentError

log = logging.getLogger(__name__)

ANSWER_S = 10.0
_DRIVER, _DRIVER_PATH = "org.freedesktop.DBus", "/org/freedesktop/DBus"
_LOGIND, _LOGIND_PATH = "org.freedesktop.login1", "/org/freedesktop/login1"
_MANAGER = f"{_LOGIND}.Manager"
_MATCHES = (
    f"type='signal',sender='{_LOGIND}',interface='{_MANAGER}',member='PrepareForSleep'",
    f"type='signal',sender='{_DRIVER}',member='NameOwnerChanged',arg0='{_LOGIND}'",
)
_WHY = ("sleep", "Ballast", "gives the guest back the memory that the host has", "delay")
_FIXED_BYTES = 16  # byte order, type, flags, version; lengths of body, serial number, length of the header's fields
_READ_BYTES, _FDS_MAX = 1 << 14, 4


class SleepLock:
    """Held while there is something to do before sleep. Nothing waits for the bus, and nothing here raises."""

    def __init__(
        self, act: Callable[[], Awaitable[object]], *, is_frozen: Callable[[], bool], path: str = SYSTEM_BUS_PATH
    ) -> None:
        """``act`` is called before the machine sleeps; it may raise AgentError, and needs a deadline of its own."""
        self._act = act
        self._is_frozen = is_frozen
        self._path = path
        self._holding: asyncio.Task[None] | None = None
        self._is_told = False

    def hold(self) -> None:
        """Take it, or take it again when it was lost; not while a file system is frozen: the bus is not asked then."""
        if (self._holding is None or self._holding.done()) and not self._is_frozen():
            self._holding = asyncio.create_task(self._hold())

    def release(self) -> None:
        """Let it go."""
        if self._holding is not None:
            self._holding.cancel()
            self._holding = None

    async def _hold(self) -> None:
        line = _Line()
        try:
            async with asyncio.timeout(ANSWER_S):
                await line.take_lock(self._path)
            self._is_told = False
            await line.wait_sleep()
            await self._act()
        except AgentError as error:
            log.warning("the balloon cannot be given back before sleep: %s", error.desc)
        except (OSError, EOFError, ValueError, BusError) as error:
            if not self._is_told:
                log.info("no word before sleep: %s; the balloon is not given back then", str(error) or repr(error))
            self._is_told = True
        finally:
            line.close()


class _Line:
    """A connection to the bus and the descriptors that came over it; the last is the lock."""

    def __init__(self) -> None:
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        self._serials = itertools.count(1)
        self._received = bytearray()
        self._fds: list[int] = []
        self._logind = ""

    def close(self) -> None:
        self._sock.close()
        for fd in self._fds:
            os.close(fd)
        self._fds = []

    async def take_lock(self, path: str) -> None:
        """OSError, EOFError, ValueError; BusError if there is no logind, or it gives no lock."""
        self._sock.connect(path)
        uid = str(os.getuid()).encode().hex()
        for line, answer in ((f"\0AUTH EXTERNAL {uid}", b"OK "), ("NEGOTIATE_UNIX_FD", b"AGREE_UNIX_FD")):
            self._sock.sendall(f"{line}\r\n".encode())
            if not (await self._read_line()).startswith(answer):
                raise BusError("the bus does not let us in, or passes no descriptors")
        self._sock.sendall(b"BEGIN\r\n")
        await self._call(Message(_DRIVER, _DRIVER_PATH, _DRIVER, "Hello"))
        for match in _MATCHES:
            await self._call(Message(_DRIVER, _DRIVER_PATH, _DRIVER, "AddMatch", signature="s", body=[match]))
        lock = Message(_LOGIND, _LOGIND_PATH, _MANAGER, "Inhibit", signature="ssss", body=list(_WHY))
        lock.flags = MessageFlag.NO_AUTOSTART
        self._logind = str((await self._call(lock)).sender)
        if not self._fds:
            raise BusError("logind gives no lock")

    async def wait_sleep(self) -> None:
        """Until logind says so; BusError when it is another, which has to be asked anew. Others' signals count not."""
        while True:
            message = await self._receive()
            if message is None:
                continue
            if message.sender == _DRIVER and message.member == "NameOwnerChanged":
                raise BusError("logind has gone, or is a new one")
            if message.sender == self._logind and message.member == "PrepareForSleep" and message.body == [True]:
                return

    async def _call(self, message: Message) -> Message:
        message.serial = next(self._serials)
        self._sock.sendall(bytes(message._marshall(False)))
        while True:
            answer = await self._receive()
            if answer is None or answer.reply_serial != message.serial:
                continue
            if answer.message_type is MessageType.METHOD_RETURN:
                return answer
            raise BusError(str(answer.body[0]) if answer.body else "", str(answer.error_name))

    async def _receive(self) -> Message | None:
        fixed = await self._read(_FIXED_BYTES)
        body_bytes, fields_bytes = struct.unpack("<4xI4xI" if fixed[:1] == b"l" else ">4xI4xI", fixed)
        fields_bytes += -fields_bytes % 8
        if fields_bytes + body_bytes > BODY_LIMIT_BYTES:
            raise ValueError("a message is too long")
        return decode(fixed + await self._read(fields_bytes + body_bytes))

    async def _read_line(self) -> bytes:
        while (end := self._received.find(b"\r\n")) < 0:
            await self._take_in()
        return await self._read(end + 2)

    async def _read(self, bytes_: int) -> bytes:
        while len(self._received) < bytes_:
            await self._take_in()
        data = bytes(self._received[:bytes_])
        del self._received[:bytes_]
        return data

    async def _take_in(self) -> None:
        loop, readable = asyncio.get_running_loop(), asyncio.Event()
        loop.add_reader(self._sock.fileno(), readable.set)
        try:
            await readable.wait()
        finally:
            loop.remove_reader(self._sock.fileno())
        data, fds, _, _ = socket.recv_fds(self._sock, _READ_BYTES, _FDS_MAX, socket.MSG_CMSG_CLOEXEC)
        self._fds += fds
        if not data or len(self._received) > 2 * BODY_LIMIT_BYTES or len(self._fds) > _FDS_MAX:
            raise EOFError("the bus is gone")
        self._received += data
