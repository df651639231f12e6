"""The pressure level as a state, for who cannot follow events: up at once, down when it has eased.

Up by the kernel's triggers; there is none for coming down, so a timer runs while the level is not low, and only then.
"""

from __future__ import annotations

import asyncio
import typing
from collections.abc import Callable

from ballast.guest.events import Subscription
from ballast.guest.memory.pressure import Pressure
from ballast.wire.memory_names import Level
from ballast.wire.message import Event

# As often as the kernel renews its averages (PSI_FREQ in kernel/sched/psi.c), and two windows of the triggers, so that
# pressure that goes on is seen each time.
LOOK_AGAIN_S = 2.0
_RANK = {level: rank for rank, level in enumerate(typing.get_args(Level))}


class PressureLevel:
    """``run`` follows the level and calls ``changed`` with each new one; the first is "low"."""

    def __init__(
        self, pressure: Pressure, changed: Callable[[Level], None], *, look_again_s: float = LOOK_AGAIN_S
    ) -> None:
        self._pressure = pressure
        self._changed = changed
        self._look_again_s = look_again_s
        self._level: Level = "low"
        self._highest: Level = "low"  # of what was heard since the last look
        self._pressed = asyncio.Event()

    async def run(self) -> None:
        """Follow it until cancelled. Without PSI it stays "low"."""
        disarm = self._pressure.watch_for_us(Subscription(frozenset(), self.hear))
        try:
            while True:
                await self._pressed.wait()
                while self._level != "low":
                    await asyncio.sleep(self._look_again_s)
                    self._set(_higher(self._highest, self._pressure.level()))
                    self._highest = "low"
                self._pressed.clear()
        finally:
            disarm()

    def hear(self, event: Event) -> bool:
        """Take in a BALLAST_PRESSURE: it can raise the level, never lower it."""
        self._highest = _higher(self._highest, event.data["level"])
        self._set(_higher(self._level, self._highest))
        self._pressed.set()
        return True

    def _set(self, level: Level) -> None:
        if level != self._level:
            self._level = level
            self._changed(level)


def _higher(one: Level, other: Level) -> Level:
    return max(one, other, key=_RANK.__getitem__)
