"""The lock on sleep, with a bus that has a logind on it, and one that has none."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import struct
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from ballast.guest.bus import Message, MessageType, decode
from ballast.guest.memory.sleep import SleepLock

LOGIND, MANAGER, PATH = ":1.4", "org.freedesktop.login1.Manager", "/org/freedesktop/login1"
DEADLINE_S = 10


def _sent(message: Message) -> bytes:
    """As a bus passes it on: the library writes no sender, so the destination's header field (6) becomes one (7)."""
    return bytes(message._marshall(False)).replace(b"\x06\x01s\0", b"\x07\x01s\0", 1)


class FakeBus:
    """A bus for one client at a time; logind on it has the reading end of each lock that it gave."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self.has_logind = True
        self.called = asyncio.Event()
        self.locks: list[int] = []
        self._sock: socket.socket | None = None
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(self.path)
        self._listener.listen()
        self._listener.setblocking(False)

    async def run(self) -> None:
        """Serve."""
        loop = asyncio.get_running_loop()
        while True:
            self._sock, _ = await loop.sock_accept(self._listener)
            with self._sock, contextlib.suppress(EOFError, OSError):
                await self._serve(self._sock)

    def close(self) -> None:
        """Gone."""
        for one in (self._listener, self._sock):
            if one is not None:
                one.close()
        for lock in self.locks:
            os.close(lock)

    async def _serve(self, sock: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        assert (await loop.sock_recv(sock, 256)).startswith(b"\0AUTH EXTERNAL ")
        await loop.sock_sendall(sock, b"OK 1234\r\n")
        assert await loop.sock_recv(sock, 256) == b"NEGOTIATE_UNIX_FD\r\n"
        await loop.sock_sendall(sock, b"AGREE_UNIX_FD\r\n")
        assert (await self._read(sock, 7)) == b"BEGIN\r\n"
        while True:
            fixed = await self._read(sock, 16)
            body_bytes, fields_bytes = struct.unpack("<4xI4xI", fixed)
            message = decode(fixed + await self._read(sock, fields_bytes + -fields_bytes % 8 + body_bytes))
            assert message is not None
            self._answer(sock, message)

    async def _read(self, sock: socket.socket, bytes_: int) -> bytes:
        data = b""
        while len(data) < bytes_:
            piece = await asyncio.get_running_loop().sock_recv(sock, bytes_ - len(data))
            if not piece:
                raise EOFError
            data += piece
        return data

    def _answer(self, sock: socket.socket, call: Message) -> None:
        if call.member != "Inhibit":
            self.say(Message(message_type=MessageType.METHOD_RETURN, reply_serial=call.serial))
        elif self.has_logind:
            assert call.body[0] == "sleep"
            assert call.body[3] == "delay"
            reading, writing = os.pipe2(os.O_NONBLOCK)
            reply = Message(
                message_type=MessageType.METHOD_RETURN, reply_serial=call.serial, destination=LOGIND, serial=9
            )
            socket.send_fds(sock, [_sent(reply)], [writing])
            os.close(writing)
            self.locks.append(reading)
            self.called.set()
        else:
            error = "org.freedesktop.DBus.Error.NameHasNoOwner"
            self.say(
                Message(
                    message_type=MessageType.ERROR,
                    error_name=error,
                    reply_serial=call.serial,
                    signature="s",
                    body=["there is no logind"],
                )
            )
            self.called.set()

    def say(self, message: Message) -> None:
        """Send it to the client."""
        assert self._sock is not None
        message.serial = 9
        self._sock.send(_sent(message))

    def sleep(self, sender: str = LOGIND, *, begins: bool = True) -> None:
        """PrepareForSleep."""
        self.say(
            Message(
                path=PATH,
                interface=MANAGER,
                member="PrepareForSleep",
                message_type=MessageType.SIGNAL,
                destination=sender,
                signature="b",
                body=[begins],
            )
        )

    def is_held(self) -> bool:
        """Whether the last lock is."""
        try:
            return os.read(self.locks[-1], 1) != b""
        except BlockingIOError:
            return True


@pytest_asyncio.fixture
async def bus(tmp_path: Path) -> AsyncIterator[FakeBus]:
    made = FakeBus(tmp_path / "bus")
    task = asyncio.create_task(made.run())
    yield made
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    made.close()


class Sleeper:
    """What is done before sleep."""

    def __init__(self, bus: FakeBus) -> None:
        self.acted = asyncio.Event()
        self.was_held = False
        self.is_frozen = False
        self._bus = bus
        self.lock = SleepLock(self._act, is_frozen=lambda: self.is_frozen, path=bus.path)

    async def _act(self) -> None:
        self.was_held = self._bus.is_held()
        self.acted.set()

    async def settle(self) -> None:
        """Until the lock's task is over."""
        assert self.lock._holding is not None
        async with asyncio.timeout(DEADLINE_S):
            await asyncio.wait({self.lock._holding})


async def take(bus: FakeBus, sleeper: Sleeper) -> None:
    sleeper.lock.hold()
    async with asyncio.timeout(DEADLINE_S):
        await bus.called.wait()
    bus.called.clear()


async def test_sleep_waits_until_it_is_done(bus: FakeBus) -> None:
    sleeper = Sleeper(bus)
    await take(bus, sleeper)
    assert bus.is_held()
    bus.sleep()
    await sleeper.settle()
    assert sleeper.was_held
    assert not bus.is_held()


async def test_only_logind_is_believed_and_only_that_it_begins(bus: FakeBus) -> None:
    sleeper = Sleeper(bus)
    await take(bus, sleeper)
    bus.sleep(":1.99")
    bus.sleep(begins=False)
    bus.say(Message(path=PATH, interface=MANAGER, member="Other", message_type=MessageType.SIGNAL, destination=LOGIND))
    await asyncio.sleep(0.1)
    assert not sleeper.acted.is_set()
    assert bus.is_held()
    sleeper.lock.release()
    await asyncio.sleep(0)
    assert not bus.is_held()


async def test_without_logind_it_is_told_once(bus: FakeBus, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    bus.has_logind = False
    sleeper = Sleeper(bus)
    for _ in range(2):
        await take(bus, sleeper)
        await sleeper.settle()
    assert [record.levelname for record in caplog.records if "no logind" in record.getMessage()] == ["INFO"]


async def test_a_bus_that_goes_is_asked_again_and_none_at_all_while_frozen(bus: FakeBus) -> None:
    sleeper = Sleeper(bus)
    sleeper.is_frozen = True
    sleeper.lock.hold()
    assert sleeper.lock._holding is None
    sleeper.is_frozen = False
    await take(bus, sleeper)
    bus.say(
        Message(
            path="/org/freedesktop/DBus",
            interface="org.freedesktop.DBus",
            member="NameOwnerChanged",
            message_type=MessageType.SIGNAL,
            destination="org.freedesktop.DBus",
            signature="sss",
            body=["org.freedesktop.login1", LOGIND, ""],
        )
    )
    await sleeper.settle()
    assert not bus.is_held()
    await take(bus, sleeper)
    assert bus.is_held()
    sleeper.lock.release()


async def test_without_a_bus(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)

    async def act() -> None:
        raise AssertionError

    lock = SleepLock(act, is_frozen=lambda: False, path=str(tmp_path / "none"))
    lock.hold()
    assert lock._holding is not None
    await asyncio.wait({lock._holding})
    assert "no word before sleep" in caplog.text
