"""What may happen between the guest's answer and the hole, with a real QEMU's memory and a fake agent's word.

Every grain of memory is random but the chunk's, so that a hole at any other place would show.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from ballast.host import linux
from ballast.host.agent import Agent
from ballast.host.balloon import Inflation, Outcome
from ballast.host.connect import PeerGone
from ballast.host.machine import MemoryMap, NotReclaimable, WrongRanges
from ballast.host.qemu import Qemu
from ballast.host.reclaim import NOTHING, ChunkVoid, GaveWay, Reclaim, Released, release
from ballast.wire.errors import AgentError
from ballast.wire.memory_names import BalloonInflated, Ranges
from tests.kernel.stopped import MIB, contents, dimm, fill, memory, stopped
from tests.unit.host.fake import STATUS, FakeAgent, serve

HIGH = 4 << 30
ARGUMENTS = ["-machine", "q35,memory-backend=ram,max-ram-below-4g=32M", *memory(64), *dimm("dimm0", 16)]
CHUNK: Ranges = [[HIGH + 8 * MIB, 16 * MIB]]
TOO_MUCH: Ranges = [[MIB, 31 * MIB], [HIGH, 32 * MIB], [HIGH + (1 << 30), 2 * MIB]]


class Guest:
    """A QEMU whose memory is known, and an agent that names a chunk of it."""

    def __init__(self, machine: Qemu, memory_map: MemoryMap, fake: FakeAgent, agent: Agent) -> None:
        self.machine = machine
        self.map = memory_map
        self.fake = fake
        self.agent = agent
        self.reclaim = Reclaim(agent, machine)
        self.before = contents(memory_map)

    def names(self, ranges: Ranges, **change: Any) -> None:
        """Let the agent's next chunk be this."""
        bytes_ = sum(one[1] for one in ranges)
        reply = {"chunk": 1, "bytes": bytes_, "total-bytes": bytes_, "ranges": ranges, "done": True, "floor": False}
        self.fake.answers["ballast-balloon-inflate"] = reply | change

    async def begin(self) -> BalloonInflated:
        """Up to the agent's answer."""
        await self.reclaim.begin()
        return await self.reclaim.inflate(1 << 30)

    def assert_whole(self) -> None:
        """Nothing of the guest's has changed."""
        assert contents(self.map) == self.before


@pytest_asyncio.fixture
async def guest(tmp_path: Path) -> AsyncIterator[Guest]:
    """With random memory, but for zeros where the chunk is."""
    async with contextlib.AsyncExitStack() as stack:
        machine = await stack.enter_async_context(stopped(tmp_path, *ARGUMENTS))
        memory_map = await machine.memory()
        (chunk,) = memory_map.locate(CHUNK)
        for region in memory_map.regions:
            fill(region, zero=[range(chunk.offset, chunk.offset + chunk.bytes)] if region.fd == chunk.fd else [])
        fake = await stack.enter_async_context(serve(tmp_path / "agent.sock"))
        fake.answers["ballast-balloon-ack"] = {}
        fake.answers["ballast-balloon-deflate"] = {"bytes": 0, "total-bytes": 0, "ranges": []}
        made = Guest(machine, memory_map, fake, await stack.enter_async_context(Agent.connect(fake.target)))
        made.names(CHUNK)
        yield made


async def inflate(guest: Guest) -> Outcome:
    """All of ``balloon set``, from its first look to its end."""
    outcome = Outcome(1 << 30, 0)
    await guest.reclaim.begin()
    await Inflation(guest.reclaim, outcome, finish=lambda step: step, advance=lambda _: None).run()
    return outcome


def freed(guest: Guest) -> int:
    """What the chunk no longer takes of the host's memory."""
    return sum(one.bytes - linux.allocated_bytes(one.fd, one.offset, one.bytes) for one in guest.map.locate(CHUNK))


async def test_a_chunk_is_freed_and_acknowledged(guest: Guest) -> None:
    outcome = await inflate(guest)
    assert (outcome.stopped, outcome.chunks, outcome.freed_bytes) == ("done", 1, 16 * MIB)
    assert guest.fake.asked[-1] == ("ballast-balloon-ack", {"chunk": 1, "punched-bytes": 16 * MIB})
    assert freed(guest) == 16 * MIB
    guest.assert_whole()


async def reset(guest: Guest) -> None:
    """The guest begins anew, and its agent does not know it yet."""
    await guest.machine.qmp.run("system_reset")


async def restart(guest: Guest) -> None:
    """Another kernel answers (kexec)."""
    guest.fake.answers["ballast-agent-status"] = STATUS | {"boot-id": "b1"}


async def press(guest: Guest) -> None:
    """The guest takes its memory back by itself."""
    guest.fake.send_event(1, "BALLAST_BALLOON", cause="pressure", **{"total-bytes": 0})


async def take_back(guest: Guest) -> None:
    """Somebody else deflates, and the chunk goes with it."""
    guest.fake.send_event(1, "BALLAST_BALLOON", cause="deflate", chunk=1, **{"total-bytes": 0})


async def lose_agent(guest: Guest) -> None:
    """Nobody answers any more."""
    guest.fake.drop()


async def prepare_snapshot(guest: Guest) -> None:
    """Somebody begins with what needs all pages where they are."""
    switch = [{"capability": "postcopy-ram", "state": True}]
    await guest.machine.qmp.run("migrate-set-capabilities", capabilities=switch)


@pytest.mark.parametrize(
    ("meanwhile", "kind", "problem"),
    [
        (reset, ChunkVoid, r"the machine was interrupted \(RESET\)"),
        (restart, ChunkVoid, "the guest has restarted"),
        (press, GaveWay, r"took its memory back \(pressure\)"),
        (take_back, ChunkVoid, "the guest has chunk 1 back"),
        (lose_agent, PeerGone, "closed the connection"),
        (prepare_snapshot, NotReclaimable, "the migration capability postcopy-ram is on"),
    ],
)
async def test_what_happens_before_the_punch_voids_the_chunk(
    guest: Guest, meanwhile: Callable[[Guest], Awaitable[None]], kind: type[AgentError], problem: str
) -> None:
    reply = await guest.begin()
    await meanwhile(guest)
    with pytest.raises(kind, match=problem):
        await guest.reclaim.punch(reply)
    assert freed(guest) == 0
    guest.assert_whole()


@pytest.mark.parametrize(
    ("ranges", "change", "problem"),
    [
        (CHUNK, {"bytes": 8 * MIB, "total-bytes": 8 * MIB}, "named 16777216 bytes as a chunk of 8388608"),
        (TOO_MUCH, {}, f"named {65 * MIB} bytes"),
        ([[0, 4096]], {}, "in the first MiB"),
        ([*CHUNK, [1 << 40, 4096]], {}, "where it has no RAM"),
        ([*CHUNK, *CHUNK], {}, "twice, or after a higher"),
    ],
)
async def test_a_chunk_of_wrong_ranges_is_given_back_whole(
    guest: Guest, ranges: Ranges, change: dict[str, Any], problem: str
) -> None:
    guest.names(ranges, **change)
    with pytest.raises(WrongRanges, match=problem):
        await inflate(guest)
    assert [one for one in guest.fake.asked if one[0].startswith("ballast-balloon-")][-2:] == [
        ("ballast-balloon-ack", {"chunk": 1, "punched-bytes": 0}),
        ("ballast-balloon-deflate", {"target-bytes": 0}),
    ]
    assert freed(guest) == 0
    guest.assert_whole()


async def test_what_was_given_before_is_not_taken_twice(guest: Guest) -> None:
    reply = await guest.begin()
    await guest.reclaim.ack(reply, (await guest.reclaim.punch(reply)).punched_bytes)
    with pytest.raises(WrongRanges, match="gave back a part before"):
        await guest.reclaim.punch(await guest.reclaim.inflate(1 << 30))
    guest.fake.send_event(1, "BALLAST_BALLOON", cause="deflate", **{"total-bytes": 0})
    assert (await guest.reclaim.punch(await guest.reclaim.inflate(1 << 30))).freed_bytes == 0
    guest.assert_whole()


async def test_memory_of_somebody_elses_is_left_alone_and_told(guest: Guest) -> None:
    guest.names([[MIB, 2 * MIB], [HIGH + (1 << 30) + 4096, 4096]])
    outcome = await inflate(guest)
    assert (outcome.stopped, outcome.not_zero_bytes, outcome.punched_bytes) == ("done", 2 * MIB + 4096, 0)
    guest.assert_whole()


async def test_a_page_that_is_written_before_the_hole_keeps_its_grain(guest: Guest) -> None:
    pieces = await guest.reclaim.locate(await guest.begin())
    os.pwrite(pieces[0].fd, b"mine again", pieces[0].offset + 5 * MIB)
    assert release(pieces) == Released(16 * MIB, 14 * MIB, 2 * MIB, 14 * MIB)
    assert os.pread(pieces[0].fd, 10, pieces[0].offset + 5 * MIB) == b"mine again"


async def test_without_a_machine_nothing_is_punched(guest: Guest) -> None:
    reclaim = Reclaim(guest.agent, None)
    await reclaim.begin()
    assert await reclaim.punch(await reclaim.inflate(1 << 30)) == NOTHING
    assert freed(guest) == 0
