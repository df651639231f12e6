"""The agent's end of the guard's socket, with a guard that says what it is told."""

from __future__ import annotations

import asyncio
import os
import select
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ballast.guest.quiesce import guard_protocol as protocol
from ballast.guest.quiesce.guard_client import GuardConnection, GuardLost
from ballast.wire.errors import Busy, DeadlineExceeded

DEADLINE_S = 10
HELLO = {"event": "hello", "version": protocol.VERSION, "pid": os.getpid()}


class FakeGuard:
    """Listens, and greets whoever comes."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "guard.sock"
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.listener.bind(str(self.path))
        self.listener.listen()
        self.listener.setblocking(False)

    async def greet(self, *messages: dict[str, Any]) -> socket.socket:
        client, _ = await asyncio.get_running_loop().sock_accept(self.listener)
        for message in messages:
            protocol.send(client, message)
        return client


@pytest.fixture
def guard(tmp_path: Path) -> Iterator[FakeGuard]:
    fake = FakeGuard(tmp_path)
    with fake.listener:
        yield fake


async def connect(guard: FakeGuard, *messages: dict[str, Any]) -> tuple[GuardConnection, socket.socket]:
    """A greeted connection, and the guard's end of it."""
    opening = asyncio.ensure_future(GuardConnection.open(str(guard.path), timeout_s=DEADLINE_S))
    client = await guard.greet(HELLO, *messages)
    return await opening, client


async def test_without_a_guard_it_is_lost_when_time_is_up(tmp_path: Path) -> None:
    with pytest.raises(GuardLost, match=r"cannot reach the guard at .*/none: No such file"):
        await GuardConnection.open(str(tmp_path / "none"), timeout_s=0.2)


async def test_a_guard_that_says_nothing_is_not_waited_for(guard: FakeGuard) -> None:
    with pytest.raises(DeadlineExceeded):
        await GuardConnection.open(str(guard.path), timeout_s=0.2)


async def test_a_guard_with_another_session_is_busy(guard: FakeGuard) -> None:
    opening = asyncio.ensure_future(GuardConnection.open(str(guard.path), timeout_s=DEADLINE_S))
    with await guard.greet({"event": "busy"}), pytest.raises(Busy):
        await opening


async def test_a_guard_that_hangs_up_before_its_greeting_is_tried_again(guard: FakeGuard) -> None:
    opening = asyncio.ensure_future(GuardConnection.open(str(guard.path), timeout_s=DEADLINE_S))
    (await guard.greet()).close()
    with await guard.greet(HELLO):
        connection = await opening
    connection.close()


async def test_the_greeting_names_the_process_to_watch(guard: FakeGuard) -> None:
    connection, client = await connect(guard)
    with client:
        assert connection.pid == os.getpid()
        assert select.select([connection.pidfd], [], [], 0)[0] == []  # it lives
        connection.close()
        assert connection.pidfd == -1
        assert client.recv(1) == b""
        connection.close()


async def test_messages_come_in_order_with_our_own_behind_them_and_the_loss_last(guard: FakeGuard) -> None:
    connection, client = await connect(guard, {"event": "settled"}, {"event": "frozen"})
    heard = [await connection.receive(timeout_s=DEADLINE_S) for _ in range(2)]
    connection.inject({"event": "net"})
    client.close()
    heard += [await connection.receive(timeout_s=DEADLINE_S) for _ in range(2)]
    assert [message["event"] for message in heard] == ["settled", "frozen", "net", "lost"]
    connection.send({"op": "thaw"})  # to nobody, and no error
    connection.close()


async def test_a_guard_that_talks_nonsense_is_lost(guard: FakeGuard) -> None:
    connection, client = await connect(guard)
    with client:
        client.send(b"nonsense")
        assert await connection.receive(timeout_s=DEADLINE_S) == {"event": "lost"}
    connection.close()


async def test_descriptors_travel_with_an_order(guard: FakeGuard) -> None:
    connection, client = await connect(guard)
    with client:
        read, write = os.pipe()
        connection.send({"op": "freeze"}, [write])
        message, fds = protocol.receive(client)
        assert message == {"op": "freeze"}
        os.write(fds[0], b"x")
        assert os.read(read, 1) == b"x"
        for fd in (read, write, *fds):
            os.close(fd)
    connection.close()


async def test_nothing_to_hear_is_a_deadline(guard: FakeGuard) -> None:
    connection, client = await connect(guard)
    with client:
        with pytest.raises(DeadlineExceeded):
            await connection.receive(timeout_s=0.01)
        protocol.send(client, {"event": "thawed"})
        assert await connection.receive(timeout_s=None) == {"event": "thawed"}
    connection.close()
