"""The moment of a backup: the guest frozen under a lease, its disks cut, the guest thawed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Literal

from ballast.host.agent import Agent
from ballast.host.storage.deadman import DeadMan
from ballast.host.storage.limits import slot
from ballast.host.storage.source import Source
from ballast.host.window import FreezePlan, FrozenWindow
from ballast.wire.errors import AgentError
from ballast.wire.names import QuiesceBegun, QuiesceEnded

Connect = Callable[[], AbstractAsyncContextManager[Agent]]
Consistency = Literal["application", "filesystem", "none"]


@dataclass(frozen=True, slots=True)
class Cut:
    """``made_s`` is the host's clock; ``cut_ms`` is what QEMU took. Without a freeze nothing began or ended."""

    made_s: float
    cut_ms: float
    begun: QuiesceBegun | None = None
    ended: QuiesceEnded | None = None

    @property
    def held(self) -> bool | None:
        """Whether all stayed frozen until we thawed it; None if nothing was frozen."""
        return None if self.begun is None else self.ended is not None and self.ended.held

    @property
    def consistency(self) -> Consistency:
        """What a restore may count on."""
        return self.begun.consistency if self.begun and self.held else "none"

    @property
    def stall_ms(self) -> float:
        """At most so long did a write in the guest wait."""
        if self.begun is None or self.ended is None:
            return self.cut_ms
        return self.begun.freeze_ms + self.ended.held_ms + self.ended.thaw_ms


async def cut_running(source: Source) -> Cut:
    """Cut the disks of a guest that goes on: what they hold is what a power failure would leave."""
    made_s, cut_ms = await _cut(source)
    return Cut(made_s, cut_ms)


async def cut_frozen(
    source: Source,
    connect: Connect,
    plan: FreezePlan,
    deadman: DeadMan,
    freezes_at_once: int,
    tell: Callable[[str], None],
) -> Cut:
    """Freeze, cut, thaw. AgentError's classes: it is thawed, or its lease or the dead man thaws it."""
    async with (
        slot("freeze", freezes_at_once, plan.max_hold_s),
        FrozenWindow(connect, plan, tell) as window,
        deadman.watching(window.id),
    ):
        begun = await window.begin()
        made_s, cut_ms = await _cut(source)
        ended = None
        try:
            ended = await window.end()
        except AgentError as error:
            tell(f"cannot tell whether it held: {error.desc}")
    return Cut(made_s, cut_ms, begun, ended)


async def _cut(source: Source) -> tuple[float, float]:
    clock = asyncio.get_running_loop().time
    made_s, before_s = time.time(), clock()
    await source.cut()
    return made_s, 1000 * (clock() - before_s)
