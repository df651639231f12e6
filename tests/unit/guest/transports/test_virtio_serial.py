r"""A virtio-serial port, with a pseudo-terminal in its place.

In canonical mode, with all else of a terminal off, it does what a port does: a line that the master writes is what a
host sends, and a ``\x04`` reads as end of file, like a port without a host. What it cannot show, a port that is
unplugged (ENODEV) or that another program has open (EBUSY), is tested in guests, in tests/vm.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import pty
import termios
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio

from ballast.guest.transports.virtio_serial import Streams, accept, find_port
from tests.unit.guest.conftest import MakeTree

DEADLINE_S = 10
HOST_GONE = b"\x04"


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ({}, None),
        ({"vport1p1/name": "org.qemu.guest_agent.0\n"}, None),
        ({"vport1p1/name": "org.ballast.agent.01\n"}, None),
        ({"vport1p1/other": ""}, None),
        ({"vport1p1/name": "org.qemu.guest_agent.0\n", "vport1p2/name": "org.ballast.agent.0\n"}, "dev/vport1p2"),
    ],
)
def test_a_port_is_found_by_its_name(make_tree: MakeTree, files: dict[str, str], found: str | None) -> None:
    root = make_tree({f"sys/class/virtio-ports/{name}": text for name, text in files.items()}).root
    assert find_port("org.ballast.agent.0", root) == (root / found if found else None)


class FakePort:
    """The host's end of a port, and where the guest finds it."""

    def __init__(self) -> None:
        self.master, self.slave = pty.openpty()
        mode = termios.tcgetattr(self.slave)
        mode[0] = mode[1] = 0
        mode[3] = termios.ICANON
        termios.tcsetattr(self.slave, termios.TCSANOW, mode)
        os.set_blocking(self.master, False)
        self.path: Path | None = Path(os.ttyname(self.slave))
        self.uevents: asyncio.Queue[None] = asyncio.Queue()
        self.looked: asyncio.Queue[Path | None] = asyncio.Queue()

    def find(self) -> Path | None:
        self.looked.put_nowait(self.path)
        return self.path

    def send(self, data: bytes) -> int:
        """BlockingIOError if the port takes no more; the number of bytes that it took."""
        return os.write(self.master, data)

    async def receive(self, size: int) -> bytes:
        """So many bytes that the guest has written."""
        data = b""
        readable = asyncio.Event()
        asyncio.get_running_loop().add_reader(self.master, readable.set)
        try:
            async with asyncio.timeout(DEADLINE_S):
                while len(data) < size:
                    readable.clear()
                    await readable.wait()
                    with contextlib.suppress(BlockingIOError):
                        data += os.read(self.master, 1 << 16)
        finally:
            asyncio.get_running_loop().remove_reader(self.master)
        return data

    def close(self) -> None:
        os.close(self.master)
        os.close(self.slave)


@pytest.fixture
def port() -> Iterator[FakePort]:
    fake = FakePort()
    yield fake
    fake.close()


@pytest_asyncio.fixture
async def sessions(port: FakePort) -> AsyncIterator[AsyncIterator[Streams]]:
    yielding = accept(port.find, port.uevents.get)
    yield yielding
    await yielding.aclose()  # type: ignore[attr-defined]


async def next_session(sessions: AsyncIterator[Streams]) -> Streams:
    async with asyncio.timeout(DEADLINE_S):
        return await anext(sessions)


async def read_line(reader: asyncio.StreamReader) -> bytes:
    async with asyncio.timeout(DEADLINE_S):
        return await reader.readline()


async def test_a_session_begins_with_the_host_s_first_byte(port: FakePort, sessions: AsyncIterator[Streams]) -> None:
    waiting = asyncio.ensure_future(anext(sessions))
    await port.looked.get()
    assert not (await asyncio.wait([waiting], timeout=0))[0]
    port.send(b"one\ntwo\n")
    async with asyncio.timeout(DEADLINE_S):
        reader, writer = await waiting
    assert [await read_line(reader), await read_line(reader)] == [b"one\n", b"two\n"]
    writer.write(b"answer\n")
    assert await port.receive(7) == b"answer\n"


async def test_a_host_that_goes_ends_the_session_and_may_come_again(
    port: FakePort, sessions: AsyncIterator[Streams]
) -> None:
    for name in (b"first\n", b"second\n"):
        port.send(name)
        reader, writer = await next_session(sessions)
        assert await read_line(reader) == name
        port.send(HOST_GONE)
        assert await read_line(reader) == b""
        assert writer.is_closing()
    assert port.looked.qsize() == 1  # it was never opened anew: QEMU tells libvirt of that


async def test_an_end_right_behind_the_first_bytes_is_none(port: FakePort, sessions: AsyncIterator[Streams]) -> None:
    """The driver can hear a host's bytes before it hears of the host."""
    port.send(b"one\n" + HOST_GONE)
    reader, writer = await next_session(sessions)
    assert await read_line(reader) == b"one\n"
    port.send(b"two\n")
    assert await read_line(reader) == b"two\n"
    assert not writer.is_closing()


async def test_what_a_host_that_went_left_unread_is_not_the_next_one_s(
    port: FakePort, sessions: AsyncIterator[Streams]
) -> None:
    port.send(b"first\n")
    _, writer = await next_session(sessions)
    size = 1 << 20
    writer.write(b"x" * size)  # more than the port takes
    port.send(HOST_GONE)
    port.send(b"second\n")
    _, second = await next_session(sessions)
    writer.write(b"late\n")
    second.write(b"answer\n")
    taken = b""
    while not taken.endswith(b"answer\n"):
        taken += await port.receive(1)
    assert len(taken) < size
    assert b"late" not in taken


async def test_a_session_that_we_close_gives_way_to_the_host_s_next_byte(
    port: FakePort, sessions: AsyncIterator[Streams]
) -> None:
    port.send(b"first\n")
    _, writer = await next_session(sessions)
    writer.close()
    await writer.wait_closed()
    port.send(b"second\n")
    reader, _ = await next_session(sessions)
    assert await read_line(reader) == b"second\n"


async def test_much_data_waits_for_the_host_to_read(port: FakePort, sessions: AsyncIterator[Streams]) -> None:
    port.send(b"hello\n")
    _, writer = await next_session(sessions)
    size = 1 << 20
    writer.write(b"x" * size)
    draining = asyncio.ensure_future(writer.drain())
    assert not (await asyncio.wait([draining], timeout=0))[0]
    assert writer.transport.get_write_buffer_size() > 0
    assert await port.receive(size) == b"x" * size
    async with asyncio.timeout(DEADLINE_S):
        await draining
    assert writer.transport.get_write_buffer_size() == 0


async def test_a_session_that_reads_no_further_pauses_the_host(
    port: FakePort, sessions: AsyncIterator[Streams]
) -> None:
    """asyncio's reader asks for a pause at twice its limit, and goes on when it was read."""
    line = b"x" * 99 + b"\n"
    sent = port.send(line)
    reader, writer = await next_session(sessions)
    held_up = False
    while not held_up:
        try:
            sent += port.send(line[sent % 100 :])
        except BlockingIOError:
            held_up = not writer.transport.is_reading()  # type: ignore[attr-defined]
            await asyncio.sleep(0)
    taken = 0
    while taken < sent - sent % 100:
        assert await read_line(reader) == line
        taken += 100
    port.send(line[sent % 100 :])
    assert await read_line(reader) == line


async def test_an_absent_port_is_looked_for_when_a_uevent_comes(
    port: FakePort, sessions: AsyncIterator[Streams]
) -> None:
    path, port.path = port.path, None
    waiting = asyncio.ensure_future(anext(sessions))
    assert await port.looked.get() is None
    port.uevents.put_nowait(None)
    assert await port.looked.get() is None
    port.path = path
    port.uevents.put_nowait(None)
    assert await port.looked.get() == path
    port.send(b"hello\n")
    async with asyncio.timeout(DEADLINE_S):
        reader, _ = await waiting
    assert await read_line(reader) == b"hello\n"


async def test_a_port_that_vanishes_before_it_is_opened_is_waited_for(
    port: FakePort, sessions: AsyncIterator[Streams], tmp_path: Path
) -> None:
    path, port.path = port.path, tmp_path / "vport1p1"
    waiting = asyncio.ensure_future(anext(sessions))
    await port.looked.get()
    port.path = path
    port.uevents.put_nowait(None)
    port.send(b"hello\n")
    async with asyncio.timeout(DEADLINE_S):
        reader, _ = await waiting
    assert await read_line(reader) == b"hello\n"


async def test_no_descriptor_stays_behind(port: FakePort) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(3):
        sessions = accept(port.find, port.uevents.get)
        port.send(b"hello\n")
        await next_session(sessions)
        await sessions.aclose()  # type: ignore[attr-defined]
    assert len(list(Path("/proc/self/fd").iterdir())) == before
