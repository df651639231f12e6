"""What is done for as long as the balloon holds something: a look at its frames each minute, and a word before sleep.

An empty balloon costs nothing: no timer, no connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging

from ballast.guest.events import Events, Subscription
from ballast.guest.memory.balloon import Balloon
from ballast.guest.memory.sleep import SleepLock
from ballast.wire.errors import AgentError
from ballast.wire.message import Event

log = logging.getLogger(__name__)

LOOK_EVERY_S = 60.0


class BalloonWatch:
    """``run`` does the work."""

    def __init__(self, balloon: Balloon, events: Events, lock: SleepLock, *, every_s: float = LOOK_EVERY_S) -> None:
        self._balloon = balloon
        self._events = events
        self._lock = lock
        self._every_s = every_s
        self._filled, self._emptied = asyncio.Event(), asyncio.Event()

    async def run(self) -> None:
        """Watch, until cancelled."""
        self._events.subscribe(Subscription(frozenset({"BALLAST_BALLOON"}), self._hear))
        self._set(self._balloon.bytes)
        try:
            while True:
                await self._filled.wait()
                self._lock.hold()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._every_s):
                        await self._emptied.wait()
                if self._emptied.is_set():
                    self._lock.release()
                    continue
                try:
                    await self._balloon.look_again()
                except AgentError as error:
                    log.warning("the balloon's frames cannot be looked at: %s", error.desc)
        finally:
            self._lock.release()

    def _hear(self, event: Event) -> bool:
        self._set(event.data["total-bytes"])
        return True

    def _set(self, bytes_: int) -> None:
        for is_so, event in ((bytes_ > 0, self._filled), (bytes_ == 0, self._emptied)):
            if is_so:
                event.set()
            else:
                event.clear()
