"""The balloon gives way by itself when memory becomes critical, before the kernel has to kill anybody.

While it holds something, two things are watched; an empty one costs nothing. Triggers of the kernel's, quicker than
those that tell the host: when every task stalls it is enough that memory is short, when some do next to nothing must
be left, since a busy page cache stalls tasks too. And what is left, as often as it could have been used up since the
last look: a program that only grows may meet the OOM killer before anything has stalled for long.

The system-wide figure cannot leave out the stalls that our own inflating makes: for one second after it they are not
acted on, unless next to nothing is left.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable

from ballast.guest.events import Events, Subscription
from ballast.guest.memory.balloon import Balloon
from ballast.guest.memory.decisions import Decisions
from ballast.guest.memory.floor import relief_bytes, urgent_bytes
from ballast.guest.memory.pressure import Pressure
from ballast.wire.errors import AgentError
from ballast.wire.memory_names import ChangeReason, PsiTrigger
from ballast.wire.message import Event

log = logging.getLogger(__name__)

TRIGGERS = (PsiTrigger("some", 50_000, 500_000), PsiTrigger("full", 50_000, 500_000))
OWN_STALL_S = 1.0
GROWTH_BYTES_PER_S = 2 << 30  # no guest was seen to take new memory faster than twice this
LOOK_MIN_S, LOOK_MAX_S = 0.1, 5.0


class Relief:
    """``run`` does the work."""

    def __init__(
        self, balloon: Balloon, pressure: Pressure, events: Events, decisions: Decisions | None = None
    ) -> None:
        self._balloon = balloon
        self._decisions = decisions or Decisions()
        self._pressure = pressure
        self._events = events
        self._pressed = asyncio.Event()
        self._all_stall = False
        self._inflated_at_s = float("-inf")
        self._disarm: Callable[[], None] = lambda: None
        self._is_armed = False

    async def run(self) -> None:
        """Give way whenever it must be, until cancelled."""
        self._events.subscribe(Subscription(frozenset({"BALLAST_BALLOON"}), self._hear))
        self._arm(wanted=self._balloon.bytes > 0)
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._next_look_s()):
                    await self._pressed.wait()
            self._pressed.clear()
            all_stall, self._all_stall = self._all_stall, False
            try:
                await self._relieve(all_stall=all_stall)
            except AgentError as error:
                log.warning("the balloon cannot give way: %s", error.desc)

    def _next_look_s(self) -> float | None:
        """When next to nothing could be left; None while there is nothing to give back."""
        if not self._is_armed:
            return None
        now = self._balloon.look()
        spare_bytes = now.available_bytes - urgent_bytes(now.total_bytes)
        return min(max(spare_bytes / GROWTH_BYTES_PER_S, LOOK_MIN_S), LOOK_MAX_S)

    async def _relieve(self, *, all_stall: bool) -> None:
        now = self._balloon.look()
        is_ours = time.monotonic() < self._inflated_at_s + OWN_STALL_S
        is_urgent = now.available_bytes < urgent_bytes(now.total_bytes)
        relief = relief_bytes(now)
        if relief and (is_urgent or (all_stall and not is_ours)):
            result = await self._balloon.give_way(relief)
            if result.bytes:  # not ten times a second that only the chunk is left which waits for its ack
                reason: ChangeReason = "short" if is_urgent else "pressure"
                self._decisions.note("gave-way", reason, result.bytes, **now.numbers(), wanted_bytes=relief)

    def _hear(self, event: Event) -> bool:
        if event.data["cause"] == "inflate":
            self._inflated_at_s = time.monotonic()
        self._arm(wanted=event.data["total-bytes"] > 0)
        self._pressed.set()  # for another time until the next look
        return True

    def _press(self, event: Event) -> bool:
        self._all_stall |= event.data["kind"] == "full"
        self._pressed.set()
        return True

    def _arm(self, *, wanted: bool) -> None:
        if wanted == self._is_armed:
            return
        self._is_armed = wanted
        if wanted:
            self._disarm = self._pressure.watch_for_us(Subscription(frozenset(), self._press), TRIGGERS)
        else:
            self._disarm()
