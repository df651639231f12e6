"""The whole way of a balloon to a size: chunk by chunk, each finished or given back whatever happens to the rest."""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Literal

from ballast.host.connection import NotUnderstood
from ballast.host.reclaim import GaveWay, Reclaim
from ballast.wire.errors import AgentError
from ballast.wire.memory_names import BalloonInflated

Stopped = Literal["done", "floor", "gave-way", "interrupted", "failed"]
# Lets a step come to its end although we are told to leave.
Finish = Callable[[Awaitable[None]], Awaitable[None]]


@dataclass(slots=True)
class Outcome:
    """What ``balloon set`` came to. ``freed_bytes`` is measured; ``not_zero_bytes`` were taken and left alone."""

    target_bytes: int
    total_bytes: int
    chunks: int = 0
    taken_bytes: int = 0
    given_back_bytes: int = 0
    punched_bytes: int = 0
    freed_bytes: int = 0
    not_zero_bytes: int = 0
    stopped: Stopped = "interrupted"
    reason: str | None = None


class Inflation:
    """Inflates to a target; ``outcome`` tells how far it came, at any time."""

    def __init__(self, reclaim: Reclaim, outcome: Outcome, *, finish: Finish, advance: Callable[[int], None]) -> None:
        self.outcome = outcome
        self._reclaim = reclaim
        self._finish = finish
        self._advance = advance
        self._is_over = False

    async def run(self) -> None:
        """Take chunk after chunk, until the target, the guest's floor, or the guest gives way. AgentError, OSError."""
        try:
            while not self._is_over:
                await self._finish(self._take_chunk())
        except GaveWay as error:
            self.outcome.stopped, self.outcome.reason = "gave-way", error.desc
        except (AgentError, OSError) as error:
            self.outcome.stopped, self.outcome.reason = "failed", str(error)
            raise

    async def _take_chunk(self) -> None:
        outcome = self.outcome
        reply = await self._reclaim.inflate(outcome.target_bytes)
        if reply.chunk is not None:
            await self._punch(reply)
        elif not reply.done and not reply.floor:
            raise NotUnderstood("the guest took no chunk, and says neither that it is done nor that it has no more")
        outcome.total_bytes = reply.total_bytes
        if reply.done or reply.floor:
            outcome.stopped = "done" if reply.done else "floor"
            self._is_over = True

    async def _punch(self, reply: BalloonInflated) -> None:
        try:
            released = await self._reclaim.punch(reply)
        except (AgentError, OSError):
            with contextlib.suppress(AgentError):  # a guest that has restarted has it already
                self.outcome.total_bytes = (await self._reclaim.give_back(reply)).total_bytes
            raise
        await self._reclaim.ack(reply, released.punched_bytes)
        self.outcome.chunks += 1
        self.outcome.taken_bytes += reply.bytes
        self.outcome.punched_bytes += released.punched_bytes
        self.outcome.freed_bytes += released.freed_bytes
        self.outcome.not_zero_bytes += released.not_zero_bytes
        self._advance(reply.bytes)
