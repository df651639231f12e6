"""Ballooned memory -> checked -> holes in the files that back it, measured.

Nothing that the guest says is trusted, and nothing of its own can be lost: a grain is punched only when it has just
been read as zero, so that a wrong range, a page that went back to the guest, or a guest that has restarted meanwhile
cost nothing. What is reported as freed is measured on the range itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ballast.host import linux
from ballast.host.agent import Agent
from ballast.host.machine import Piece, WrongRanges
from ballast.host.qemu import Qemu
from ballast.wire.errors import AgentError, NoSuchId
from ballast.wire.memory_names import BalloonDeflated, BalloonInflated, Ranges

GRAIN_BYTES = 2 << 20


class ChunkVoid(AgentError):
    """A chunk is not in the guest's balloon any more, or may not be: what the guest said of it no longer counts."""


class GaveWay(ChunkVoid):
    """The guest needed memory of its balloon itself and took it back. ``data`` is that of the event."""


@dataclass(frozen=True, slots=True)
class Released:
    """What became of some ranges on the host."""

    asked_bytes: int
    punched_bytes: int
    not_zero_bytes: int
    freed_bytes: int

    def __add__(self, other: Released) -> Released:
        return Released(
            self.asked_bytes + other.asked_bytes,
            self.punched_bytes + other.punched_bytes,
            self.not_zero_bytes + other.not_zero_bytes,
            self.freed_bytes + other.freed_bytes,
        )


NOTHING = Released(0, 0, 0, 0)


def release(pieces: Sequence[Piece]) -> Released:
    """Punch what reads as zero, grain by grain, and leave the rest alone. Blocks. OSError.

    Between the look at a grain and its hole there is nothing, on purpose.
    """
    punched_bytes = not_zero_bytes = 0
    before_bytes = _allocated_bytes(pieces)
    for fd, offset, bytes_ in _grains(pieces):
        if not linux.is_zero(fd, offset, bytes_):
            not_zero_bytes += bytes_
            continue
        linux.punch_hole(fd, offset, bytes_)
        punched_bytes += bytes_
    freed_bytes = max(0, before_bytes - _allocated_bytes(pieces))
    return Released(sum(piece.bytes for piece in pieces), punched_bytes, not_zero_bytes, freed_bytes)


def _grains(pieces: Sequence[Piece]) -> Iterator[tuple[int, int, int]]:
    """Cut at every multiple of GRAIN_BYTES of the file, so that a hole is whole huge pages where there are some."""
    for piece in pieces:
        offset, end = piece.offset, piece.offset + piece.bytes
        while offset < end:
            following = min(end, (offset // GRAIN_BYTES + 1) * GRAIN_BYTES)
            yield piece.fd, offset, following - offset
            offset = following


def _allocated_bytes(pieces: Sequence[Piece]) -> int:
    return sum(linux.allocated_bytes(piece.fd, piece.offset, piece.bytes) for piece in pieces)


class Reclaim:
    """The balloon of one guest: ``begin``, then ``inflate``, ``locate``, ``release`` and ``ack`` for each chunk.

    It takes the events of its connection to the agent. ``give_back`` ends a chunk that is not to be punched.
    Without a machine nothing is punched: the guest has less, and the host no more.
    """

    def __init__(self, agent: Agent, machine: Qemu | None) -> None:
        self._agent = agent
        self._machine = machine
        self._boot_id = ""
        self._chunk_bytes = 0
        self._given: Ranges = []  # since begin()

    async def begin(self) -> None:
        """Look whether this machine may be punched at all. NotReclaimable."""
        await self._agent.subscribe(["BALLAST_BALLOON"])
        about = await self._agent.status()
        self._boot_id, self._chunk_bytes = about.boot_id, about.limits.chunk_bytes
        if self._machine is not None:
            await self._machine.memory()

    async def inflate(self, target_bytes: int) -> BalloonInflated:
        """Have the guest take a chunk towards the target, or name again the one that waits for its ack. GaveWay."""
        self._take_events()
        if self._machine is not None:
            await self._machine.upheavals()
        return await self._agent.balloon_inflate(target_bytes)

    async def locate(self, reply: BalloonInflated) -> list[Piece]:
        """Where a chunk is on this host, if all still is as when the guest named it. ChunkVoid, NotReclaimable."""
        if self._machine is None:
            return []
        self._take_events(reply.chunk)  # those before the answer: what went back can be in this chunk
        pieces = (await self._machine.memory()).locate(reply.ranges, self._given)
        bytes_ = sum(piece.bytes for piece in pieces)
        if bytes_ != reply.bytes or bytes_ > self._chunk_bytes:
            raise WrongRanges(f"the guest named {bytes_} bytes as a chunk of {reply.bytes}")
        if (await self._agent.status()).boot_id != self._boot_id:
            raise ChunkVoid("the guest has restarted")
        if upheavals := await self._machine.upheavals():
            raise ChunkVoid(f"the machine was interrupted ({', '.join(upheavals)})")
        self._take_events(reply.chunk)
        return pieces

    async def punch(self, reply: BalloonInflated) -> Released:
        """Locate and release: what a chunk holds goes to the host. ChunkVoid, NotReclaimable, OSError."""
        return await asyncio.to_thread(release, await self.locate(reply))

    async def ack(self, reply: BalloonInflated, punched_bytes: int) -> None:
        """Tell the guest that the host has done with a chunk. ChunkVoid if it had taken that back."""
        if reply.chunk is None:
            return
        try:
            await self._agent.balloon_ack(reply.chunk, punched_bytes)
        except NoSuchId as error:
            self._take_events()
            raise ChunkVoid(error.desc) from error
        self._given += reply.ranges

    async def give_back(self, reply: BalloonInflated) -> BalloonDeflated:
        """Let the guest have a chunk again that waits for its ack. By a deflate alone it would come last of all."""
        await self.ack(reply, 0)
        held_bytes = (await self._agent.memory_status()).balloon.bytes
        return await self.deflate(max(0, held_bytes - reply.bytes))

    async def deflate(self, target_bytes: int) -> BalloonDeflated:
        """Let the guest have all beyond the target again; the host's memory for it comes as the guest touches it."""
        self._given.clear()  # which of it, only the guest knows
        return await self._agent.balloon_deflate(target_bytes)

    def _take_events(self, chunk: int | None = None) -> None:
        for event in self._agent.take_events():
            cause = event.data.get("cause")
            if chunk is not None and event.data.get("chunk") == chunk:
                raise ChunkVoid(f"the guest has chunk {chunk} back")
            if cause in ("pressure", "holder-lost", "suspend"):
                raise GaveWay(f"the guest took its memory back ({cause})", **event.data)
            if cause == "deflate":
                self._given.clear()
