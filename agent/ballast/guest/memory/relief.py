"""The balloon gives way by itself when memory becomes critical, before the kernel has to kill anybody.

Triggers of the kernel's are armed while the balloon holds something; an empty one costs nothing. The system-wide
figure cannot leave out the stalls that our own inflating makes, so for one window after it they are not acted on,
unless there is next to nothing left.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from ballast.guest.events import Events, Subscription
from ballast.guest.memory.balloon import Balloon
from ballast.guest.memory.floor import floor_bytes, relief_bytes
from ballast.guest.memory.pressure import Pressure
from ballast.wire.errors import AgentError
from ballast.wire.message import Event

log = logging.getLogger(__name__)

OWN_STALL_S = 1.0  # one window of the triggers


class Relief:
    """``run`` does the work."""

    def __init__(self, balloon: Balloon, pressure: Pressure, events: Events) -> None:
        self._balloon = balloon
        self._pressure = pressure
        self._events = events
        self._pressed = asyncio.Event()
        self._inflated_at_s = float("-inf")
        self._disarm: Callable[[], None] = lambda: None
        self._is_armed = False

    async def run(self) -> None:
        """Give way whenever it must be, until cancelled."""
        self._events.subscribe(Subscription(frozenset({"BALLAST_BALLOON"}), self._hear))
        self._arm(wanted=self._balloon.bytes > 0)
        while True:
            await self._pressed.wait()
            self._pressed.clear()
            try:
                await self._relieve()
            except AgentError as error:
                log.error("the balloon cannot give way: %s", error.desc)  # noqa: TRY400 - the reason says it all

    async def _relieve(self) -> None:
        now = self._balloon.look()
        is_ours = time.monotonic() < self._inflated_at_s + OWN_STALL_S
        is_urgent = now.available_bytes < floor_bytes(now.total_bytes) // 2
        relief = relief_bytes(now)
        if relief and (is_urgent or not is_ours):
            result = await self._balloon.give_way(relief)
            log.warning(
                "memory is short: the balloon gave %d bytes back, %d are left", result.bytes, result.total_bytes
            )

    def _hear(self, event: Event) -> bool:
        if event.data["cause"] == "inflate":
            self._inflated_at_s = time.monotonic()
        self._arm(wanted=event.data["total-bytes"] > 0)
        return True

    def _press(self, _event: Event) -> bool:
        self._pressed.set()
        return True

    def _arm(self, *, wanted: bool) -> None:
        if wanted == self._is_armed:
            return
        self._is_armed = wanted
        if wanted:
            self._disarm = self._pressure.watch_for_us(Subscription(frozenset(), self._press))
        else:
            self._disarm()
