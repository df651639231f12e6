"""The balloon with a real holder, a few MiB of this machine's memory for a moment; in a guest: tests/vm."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from ballast.guest.events import Events, Subscription
from ballast.guest.linux import mman
from ballast.guest.linux.pagemap import PAGE_BYTES, Pagemap
from ballast.guest.linux.pidfd import copy_descriptor
from ballast.guest.linux.tree import Tree
from ballast.guest.linux.uring import Ring
from ballast.guest.memory import balloon as balloon_module
from ballast.guest.memory import holder_protocol as protocol
from ballast.guest.memory.balloon import Balloon
from ballast.guest.memory.decisions import Decisions
from ballast.guest.memory.holder_client import HolderConnection, holder_state
from ballast.guest.memory.holder_protocol import CHUNK_BYTES, GRAIN_BYTES
from ballast.wire.errors import DeadlineExceeded, KernelFailure, NoSuchId, NotSupported
from ballast.wire.message import Event
from tests.kernel.conftest import AGENT

DEADLINE_S = 30
CGROUP = "sys/fs/cgroup/ballast.slice/ballast-balloon.service/cgroup.procs"


@pytest.fixture(autouse=True)
def _io_uring() -> None:
    try:
        Ring.open(1).close()
    except OSError as error:
        pytest.skip(f"no io_uring here: {error}")


class Holders:
    """Starts holders on one socket, as systemd would, and says in a tree of its own whether one runs."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "balloon.sock"
        self.tree = Tree(folder / "tree")
        (folder / "tree").mkdir()
        (folder / "tree/proc").symlink_to("/proc")
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(str(self.path))
        self._listener.listen(4)
        self._processes: list[subprocess.Popen[bytes]] = []

    def start(self, kernel: str = "") -> subprocess.Popen[bytes]:
        """A holder that listens; ``kernel`` is Python that makes its kernel another."""
        program = (
            f"{kernel}\nimport os, sys; os.dup2(int(sys.argv[1]), 3); os.environ['LISTEN_PID'] = str(os.getpid());"
            "from ballast.guest.memory.holder import main; sys.exit(main())"
        )
        process = subprocess.Popen(
            ["/usr/bin/python3", "-B", "-c", program, str(self._listener.fileno())],
            pass_fds=[self._listener.fileno()],
            env={"PYTHONPATH": str(AGENT), "LISTEN_FDS": "1", "PATH": os.environ["PATH"]},
            stderr=sys.stderr,
        )
        self._processes.append(process)
        self._say(str(process.pid))
        return process

    def kill(self) -> None:
        """kill -9 the holder that runs."""
        self._processes[-1].kill()
        self._processes[-1].wait()
        self._say("")

    def _say(self, text: str) -> None:
        path = self.tree.path(CGROUP)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def close(self) -> None:
        """End them all."""
        for process in self._processes:
            process.kill()
            process.wait()
        self._listener.close()


@pytest.fixture
def holders(tmp_path: Path) -> Iterator[Holders]:
    made = Holders(tmp_path)
    made.start()
    yield made
    made.close()


class Told:
    """Hears what is published of the balloon."""

    def __init__(self) -> None:
        self.events = Events()
        self.decisions = Decisions()
        self.data: list[dict[str, Any]] = []
        self.came = asyncio.Event()
        self.events.subscribe(Subscription(frozenset({"BALLAST_BALLOON"}), self._hear))

    def _hear(self, event: Event) -> bool:
        self.data.append(event.data)
        self.came.set()
        return True


@pytest.fixture
def told() -> Told:
    return Told()


@pytest_asyncio.fixture
async def balloon(holders: Holders, told: Told) -> AsyncIterator[Balloon]:
    made = Balloon(holders.tree, told.events, told.decisions, boot_id="boot", path=str(holders.path))
    yield made
    hang_up(made)


def hang_up(balloon: Balloon) -> None:
    """What an agent's end does."""
    if balloon._holder is not None:
        balloon._holder.close()
        balloon._holder = None


async def test_a_chunk_waits_for_its_ack_and_then_the_next_is_taken(balloon: Balloon, told: Told) -> None:
    first = await balloon.inflate(3 * GRAIN_BYTES)
    assert (first.bytes, first.total_bytes, first.done, first.floor) == (3 * GRAIN_BYTES, 3 * GRAIN_BYTES, True, False)
    assert sum(bytes_ for _, bytes_ in first.ranges) == first.bytes
    assert all(address % PAGE_BYTES == bytes_ % PAGE_BYTES == 0 for address, bytes_ in first.ranges)
    assert first.ranges == sorted(first.ranges)
    repeated = await balloon.inflate(CHUNK_BYTES)
    assert (repeated.chunk, repeated.ranges, repeated.done) == (first.chunk, first.ranges, False)
    assert first.chunk is not None
    await balloon.ack(first.chunk, first.bytes)
    with pytest.raises(NoSuchId):
        await balloon.ack(first.chunk, first.bytes)
    second = await balloon.inflate(5 * GRAIN_BYTES)
    assert second.chunk != first.chunk
    assert (second.bytes, second.total_bytes) == (2 * GRAIN_BYTES, 5 * GRAIN_BYTES)
    assert not {tuple(range_) for range_ in second.ranges} & {tuple(range_) for range_ in first.ranges}
    held = await balloon.ranges()
    assert (held.boot_id, held.total_bytes) == ("boot", 5 * GRAIN_BYTES)
    assert sum(bytes_ for _, bytes_ in held.ranges) == held.total_bytes
    assert [data["cause"] for data in told.data] == ["inflate", "inflate"]


async def test_no_more_than_a_chunk_at_a_time(balloon: Balloon) -> None:
    taken = await balloon.inflate(10 * CHUNK_BYTES)
    assert (taken.bytes, taken.done) == (CHUNK_BYTES, False)


async def test_its_pages_are_zero_and_nobody_can_write_them(balloon: Balloon, holders: Holders) -> None:
    """The host gives away only what it reads as zero."""
    await balloon.inflate(2 * GRAIN_BYTES)
    pid = int(holders.tree.read(CGROUP))
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    (line,) = [line for line in lines if "---p" in line and size_of(line) == 2 * GRAIN_BYTES]
    with Path(f"/proc/{pid}/mem").open("rb") as memory:
        memory.seek(int(line.split("-")[0], 16))
        assert not any(memory.read(2 * GRAIN_BYTES))


def size_of(line: str) -> int:
    """Bytes of a line of /proc/PID/maps."""
    first, last = line.split()[0].split("-")
    return int(last, 16) - int(first, 16)


async def test_deflating_keeps_to_the_target_by_the_grain(balloon: Balloon) -> None:
    taken = await balloon.inflate(8 * GRAIN_BYTES)
    assert taken.chunk is not None
    await balloon.ack(taken.chunk, 0)
    before = await balloon.ranges()
    given = await balloon.deflate(5 * GRAIN_BYTES + 1)
    assert (given.bytes, given.total_bytes) == (3 * GRAIN_BYTES, 5 * GRAIN_BYTES)
    after = await balloon.ranges()
    assert after.generation != before.generation
    frames = [set(frames_of(ranges)) for ranges in (before.ranges, after.ranges, given.ranges)]
    assert frames[0] == frames[1] | frames[2]
    assert not frames[1] & frames[2]
    assert (await balloon.deflate(5 * GRAIN_BYTES)).bytes == 0
    assert (await balloon.deflate(0)).total_bytes == 0
    assert balloon.state().target_bytes == 0


def frames_of(ranges: list[list[int]]) -> list[int]:
    """First bytes of all pages in them."""
    return [page for address, bytes_ in ranges for page in range(address, address + bytes_, PAGE_BYTES)]


async def test_an_empty_holder_leaves(balloon: Balloon, holders: Holders) -> None:
    await balloon.inflate(GRAIN_BYTES)
    await balloon.deflate(0)
    assert await asyncio.to_thread(holders._processes[-1].wait, DEADLINE_S) == 0


async def test_a_chunk_given_back_before_its_ack_is_told_first_and_its_ack_refused(
    balloon: Balloon, told: Told
) -> None:
    taken = await balloon.inflate(2 * GRAIN_BYTES)
    assert taken.chunk is not None
    told.data.clear()
    given = await balloon.deflate(0)
    assert given.ranges == taken.ranges
    assert told.data[0] == {"cause": "deflate", "total-bytes": 0, "chunk": taken.chunk, "ranges": taken.ranges}
    with pytest.raises(NoSuchId):
        await balloon.ack(taken.chunk, 0)


async def test_giving_way_leaves_the_chunk_that_the_host_may_be_punching(balloon: Balloon, told: Told) -> None:
    first = await balloon.inflate(2 * GRAIN_BYTES)
    assert first.chunk is not None
    await balloon.ack(first.chunk, 0)
    second = await balloon.inflate(5 * GRAIN_BYTES)
    given = await balloon.give_way(1 << 40)
    assert (given.bytes, given.total_bytes) == (first.bytes, second.bytes)
    assert told.data[-1] == {"cause": "pressure", "total-bytes": second.bytes}
    again = await balloon.inflate(5 * GRAIN_BYTES)
    assert again.chunk == second.chunk
    assert again.chunk is not None
    await balloon.ack(again.chunk, 0)
    # What was asked for before it gave way is not given.
    refused = await balloon.inflate(5 * GRAIN_BYTES)
    assert (refused.chunk, refused.bytes, refused.floor, refused.done) == (None, 0, True, False)


async def test_the_next_agent_finds_all_of_it_with_the_chunk_that_waits(holders: Holders, told: Told) -> None:
    old = Balloon(holders.tree, told.events, boot_id="boot", path=str(holders.path))
    first = await old.inflate(GRAIN_BYTES)
    assert first.chunk is not None
    await old.ack(first.chunk, 0)
    second = await old.inflate(3 * GRAIN_BYTES)
    before = await old.ranges()
    new = Balloon(holders.tree, told.events, boot_id="boot", path=str(holders.path))
    await new.recover()
    assert (new.bytes, new.state().target_bytes) == (3 * GRAIN_BYTES, 3 * GRAIN_BYTES)
    assert holder_state(holders.tree, new.bytes) == "active"
    assert await new.ranges() == before
    assert (await new.inflate(3 * GRAIN_BYTES)).chunk == second.chunk
    assert second.chunk is not None
    await new.ack(second.chunk, 0)
    hang_up(new)


async def test_what_it_took_gave_and_lost_is_explained(balloon: Balloon, holders: Holders, told: Told) -> None:
    for _ in range(2):
        chunk = (await balloon.inflate(2 * CHUNK_BYTES)).chunk
        assert chunk is not None
        await balloon.ack(chunk, 0)
    await balloon.deflate(CHUNK_BYTES)
    told.came.clear()
    holders.kill()
    async with asyncio.timeout(DEADLINE_S):
        await told.came.wait()
    decisions = told.decisions.last()
    assert [(one.change, one.reason, one.bytes) for one in decisions] == [
        ("inflated", "asked", CHUNK_BYTES),
        ("inflated", "asked", CHUNK_BYTES),
        ("deflated", "asked", CHUNK_BYTES),
        ("holder-lost", "killed", CHUNK_BYTES),
    ]
    first, second, *_ = (one.numbers for one in decisions)
    assert (first["balloon-bytes"], second["balloon-bytes"]) == (0, CHUNK_BYTES)
    assert first["room-bytes"] <= first["available-bytes"] - first["floor-bytes"]


async def test_that_it_takes_nothing_is_explained_once(
    balloon: Balloon, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(balloon, "_gave_way_at_s", time.monotonic())
    for _ in range(3):
        assert (await balloon.inflate(CHUNK_BYTES)).floor
    (refusal,) = told.decisions.last()
    assert (refusal.change, refusal.reason, refusal.bytes) == ("not-inflated", "pressure", CHUNK_BYTES)


async def test_without_its_holder_the_chunk_that_waits_is_still_pinned(
    balloon: Balloon, holders: Holders, told: Told
) -> None:
    first = await balloon.inflate(GRAIN_BYTES)
    assert first.chunk is not None
    await balloon.ack(first.chunk, 0)
    second = await balloon.inflate(3 * GRAIN_BYTES)
    told.data.clear()
    told.came.clear()
    pinned = pinned_pages()
    holders.kill()
    async with asyncio.timeout(DEADLINE_S):
        await told.came.wait()
    assert told.data == [{"cause": "holder-lost", "total-bytes": second.bytes}]
    assert balloon.bytes == second.bytes
    assert (await balloon.inflate(3 * GRAIN_BYTES)).ranges == second.ranges
    assert second.chunk is not None
    await balloon.ack(second.chunk, second.bytes)
    assert balloon.bytes == 0
    assert told.data[-1] == {
        "cause": "holder-lost",
        "total-bytes": 0,
        "chunk": second.chunk,
        "ranges": second.ranges,
    }
    assert await comes_true(lambda: pinned_pages() < pinned)  # the kernel ends a ring behind our backs


async def comes_true(condition: Callable[[], bool]) -> bool:
    """Look until it is so, or time is up."""
    for _ in range(100 * DEADLINE_S):
        if condition():
            return True
        await asyncio.sleep(0.01)
    return False


def pinned_pages() -> int:
    """Pages or folios that are pinned on this machine now (/proc/vmstat)."""
    lines = dict(line.split() for line in Path("/proc/vmstat").read_text().splitlines())
    return int(lines["nr_foll_pin_acquired"]) - int(lines["nr_foll_pin_released"])


async def test_the_lost_holder_s_last_chunk_can_be_given_back_as_well(balloon: Balloon, holders: Holders) -> None:
    await balloon.inflate(2 * GRAIN_BYTES)
    holders.kill()
    given = await balloon.deflate(0)
    assert (given.bytes, given.total_bytes, balloon.bytes) == (2 * GRAIN_BYTES, 0, 0)


async def test_after_a_lost_holder_the_next_is_asked(
    balloon: Balloon, holders: Holders, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(balloon_module, "HOLD_OFF_S", 0)
    taken = await balloon.inflate(GRAIN_BYTES)
    assert taken.chunk is not None
    await balloon.ack(taken.chunk, 0)
    holders.kill()
    holders.start()
    assert await comes_true(lambda: balloon.bytes == 0)
    other = await balloon.inflate(2 * GRAIN_BYTES)
    assert other.chunk != taken.chunk
    assert balloon.bytes == 2 * GRAIN_BYTES


async def test_a_holder_that_does_not_answer_is_given_up_and_found_again(
    balloon: Balloon, holders: Holders, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = await balloon.inflate(2 * GRAIN_BYTES)
    holders._processes[-1].send_signal(signal.SIGSTOP)
    monkeypatch.setattr(balloon_module, "GIVE_S", 0.3)
    with pytest.raises(DeadlineExceeded):
        await balloon.ranges()
    assert balloon.bytes == 2 * GRAIN_BYTES  # as far as anybody knows
    monkeypatch.undo()
    holders._processes[-1].send_signal(signal.SIGCONT)
    assert (await balloon.ranges()).ranges == taken.ranges
    assert taken.chunk is not None
    await balloon.ack(taken.chunk, 0)


async def test_one_that_was_given_up_and_then_died_holds_nothing(
    balloon: Balloon, holders: Holders, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = await balloon.inflate(GRAIN_BYTES)
    assert taken.chunk is not None
    await balloon.ack(taken.chunk, 0)
    holders._processes[-1].send_signal(signal.SIGSTOP)
    monkeypatch.setattr(balloon_module, "GIVE_S", 0.3)
    with pytest.raises(DeadlineExceeded):
        await balloon.ranges()
    holders.kill()
    assert (await balloon.ranges()).total_bytes == balloon.bytes == 0


@pytest.mark.parametrize("line", [b"garbage", b"[]", b"{}", b'{"op":"destroy"}', b'{"op":"take","bytes":1}'])
async def test_a_client_that_talks_nonsense_is_hung_up_and_takes_nothing_along(
    balloon: Balloon, holders: Holders, line: bytes
) -> None:
    taken = await balloon.inflate(GRAIN_BYTES)
    assert taken.chunk is not None
    await balloon.ack(taken.chunk, 0)
    hang_up(balloon)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client:
        client.settimeout(DEADLINE_S)
        client.connect(str(holders.path))
        assert protocol.receive(client)
        client.send(line)
        assert protocol.receive(client) is None
    assert (await balloon.ranges()).total_bytes == GRAIN_BYTES


async def test_a_call_ends_a_take_early(holders: Holders) -> None:
    """Whoever deflates does not wait until a chunk is full."""
    connection, held = await HolderConnection.open(str(holders.path), lambda _gone: None, timeout_s=DEADLINE_S)
    assert held is None
    taking = asyncio.ensure_future(connection.take(CHUNK_BYTES, timeout_s=DEADLINE_S))
    await asyncio.sleep(0)
    connection.hurry()
    chunk = await taking
    assert GRAIN_BYTES <= chunk.bytes < CHUNK_BYTES
    chunk.let_go()
    connection.close()


def test_frames_are_told_once_they_are_there() -> None:
    address = mman.map_for_huge_pages(GRAIN_BYTES)
    ring = Ring.open(1)
    try:
        with pytest.raises(OSError, match="the page is not there") as caught:
            Pagemap().ranges(address, GRAIN_BYTES)
        assert caught.value.errno == errno.EFAULT
        ring.pin(0, address, GRAIN_BYTES)
        mman.forbid_access(address, GRAIN_BYTES)
        ranges = Pagemap().ranges(address, GRAIN_BYTES)
        assert sum(bytes_ for _, bytes_ in ranges) == GRAIN_BYTES
        with pytest.raises(OSError, match="io_uring_register"):
            ring.pin(0, address, GRAIN_BYTES)  # PROT_NONE now
    finally:
        ring.unpin_all()
        ring.close()
        mman.unmap(address, GRAIN_BYTES)


def test_a_copied_ring_is_the_same_ring() -> None:
    ring = Ring.open(1)
    copy = Ring(copy_descriptor(os.getpid(), ring.fd))
    ring.close()
    copy.unpin_all()
    with pytest.raises(OSError, match="io_uring_register") as caught:
        copy.unpin_all()
    assert caught.value.errno == errno.ENXIO
    copy.close()
    with pytest.raises(OSError, match="pidfd_getfd") as caught:
        copy_descriptor(os.getpid(), copy.fd)
    assert caught.value.errno == errno.EBADF


def test_of_nobody_no_descriptor_can_be_copied() -> None:
    with pytest.raises(ProcessLookupError):
        copy_descriptor(2**22 - 1, 0)


# The pin does not hold: each page is somewhere else whenever one looks.
MOVING = """
from ballast.guest.memory.chunk import Chunk
Chunk.look_again = lambda self, pagemap: [[[4096, 4096]]] * len(self.ranges)
"""
# What pagemap shows without CAP_SYS_ADMIN: present, and no frame.
HIDDEN = """
import array, os
read = os.pread
def pread(fd, bytes_, offset):
    entries = array.array("Q", read(fd, bytes_, offset))
    return array.array("Q", [entry & ~((1 << 55) - 1) for entry in entries]).tobytes()
os.pread = pread
"""


async def test_a_page_that_has_moved_stops_it_once_and_for_all(
    balloon: Balloon, holders: Holders, told: Told, caplog: pytest.LogCaptureFixture
) -> None:
    holders.kill()
    holders.start(MOVING)
    first = await balloon.inflate(GRAIN_BYTES)
    assert first.chunk is not None
    await balloon.ack(first.chunk, 0)
    second = await balloon.inflate(2 * GRAIN_BYTES)
    for _ in range(2):
        with pytest.raises(KernelFailure, match="moved"):
            await balloon.inflate(2 * GRAIN_BYTES)
    with pytest.raises(KernelFailure, match="moved"):
        await balloon.ranges()
    await balloon.look_again()
    alarms = [record for record in caplog.records if record.levelname == "ERROR"]
    assert len(alarms) == 1
    assert balloon.state().fault == "moved"
    assert balloon.bytes == GRAIN_BYTES
    moved = [data for data in told.data if data["cause"] == "moved"]
    assert [data.get("chunk") for data in moved] == [None, second.chunk]
    assert (await balloon.deflate(0)).total_bytes == 0


async def test_where_frames_are_hidden_it_refuses_with_the_reason(balloon: Balloon, holders: Holders) -> None:
    holders.kill()
    holders.start(HIDDEN)
    with pytest.raises(NotSupported, match="CAP_SYS_ADMIN"):
        await balloon.inflate(GRAIN_BYTES)
    assert balloon.bytes == 0


async def test_the_looks_take_chunk_after_chunk_in_turn(balloon: Balloon) -> None:
    chunks = []
    for grains in range(1, 4):
        chunks.append((await balloon.inflate(grains * GRAIN_BYTES)).chunk)
        await balloon.ack(chunks[-1] or 0, 0)
    looked_at = []
    for _ in range(5):
        await balloon.look_again()
        looked_at.append(balloon._looked_at)
    assert looked_at == [*chunks, *chunks[:2]]


async def test_before_sleep_all_is_given_back_and_nothing_taken_for_a_while(balloon: Balloon, told: Told) -> None:
    first = await balloon.inflate(GRAIN_BYTES)
    assert first.chunk is not None
    await balloon.ack(first.chunk, 0)
    await balloon.inflate(2 * GRAIN_BYTES)
    assert (await balloon.give_back_before_sleep()).total_bytes == 0
    assert {data["cause"] for data in told.data[2:]} == {"suspend"}
    assert (await balloon.inflate(GRAIN_BYTES)).floor
