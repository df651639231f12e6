"""The pressure level as a state: up at once, down when it has eased.

It rises by the kernel's triggers, and by the averages at each reading. There is no trigger for coming down, so one
timer runs while the level is not low, a window at a time, and only then: in a guest at rest nothing wakes up.

Where the stalls come from, best first. ``slices``: the control groups other than ours (see ``groups``). ``system``: the
system-wide figure, where the kernel measures no groups; it has our own stalls in it, so for one window after we have
inflated its triggers are not acted on. ``vmstat``: without PSI, counters of stalls (see ``stalls``), which are compared
at readings: no event of the kernel's tells of them, so the level rises when somebody reads and not before.
"""

from __future__ import annotations

import asyncio
import logging
import time
import typing
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from ballast.guest.config import Pressure as Settings
from ballast.guest.events import Events, Subscription
from ballast.guest.linux.psi import PRESSURE_FILE, StallFile, parse_stalls
from ballast.guest.linux.tree import Tree
from ballast.guest.memory.groups import SINGLE, Groups
from ballast.guest.memory.stalls import StallRates
from ballast.guest.memory.trigger import Trigger
from ballast.wire.memory_names import Level, LevelSource, PsiTrigger, StallKind
from ballast.wire.message import Event

log = logging.getLogger(__name__)

_RANK = {level: rank for rank, level in enumerate(typing.get_args(Level))}
_LEVEL_OF: dict[StallKind, Level] = {"some": "medium", "full": "critical"}
# A trigger that goes on firing does so once a window, and a little late at times.
HELD_WINDOWS = 2


@dataclass(frozen=True, slots=True)
class Look:
    """One look. ``some_percent``: the share of time that tasks other than ours stalled lately, 0 to 100."""

    level: Level
    source: LevelSource
    system: StallFile | None
    groups: dict[str, StallFile]
    some_percent: float


class PressureLevel:
    """``look`` at any time; ``run`` follows the level and calls ``changed`` with each new one. The first is "low"."""

    def __init__(
        self,
        tree: Tree,
        settings: Settings | None = None,
        changed: Callable[[Level], None] = lambda _level: None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._tree = tree
        self._settings = settings = settings or Settings()
        self._changed = changed
        self._clock = clock
        self._window_s = settings.window_ms / 1000
        percents: dict[StallKind, int] = {"some": settings.medium_percent, "full": settings.critical_percent}
        self._triggers = [
            PsiTrigger(kind, settings.window_ms * 10 * percent, settings.window_ms * 1000)
            for kind, percent in percents.items()
        ]
        self._groups = Groups(tree, settings.cgroups, self._triggers)
        self._rates = StallRates(clock)
        self._level: Level = "low"
        self._heard_at_s: dict[Level, float] = {}
        self._inflated_at_s = float("-inf")
        self._pressed = asyncio.Event()

    @property
    def now(self) -> Level:
        """The level, as of the last look or trigger."""
        return self._level

    def look(self) -> Look:
        """Read all figures, and set the level by them. May run while frozen."""
        system, groups = read_system(self._tree), self._groups.read()
        source: LevelSource = "slices" if groups else "system" if system else "vmstat"
        figures = groups or ({"": system} if system else {})
        some_percent = max((figure.some.avg10 for figure in figures.values()), default=0.0)
        full_percent = max((figure.full.avg10 for name, figure in figures.items() if name != SINGLE), default=0.0)
        if source == "vmstat":
            some_percent, full_percent = self._rates.read(self._tree)
        level = max(self._by_share(some_percent, full_percent), self._heard(), key=rank)
        if source == "system" and self._is_inflating():
            level = min(level, self._level, key=rank)
        self._set(level)
        if self._level != "low":
            # The average over ten seconds comes late: that a trigger has fired says as much.
            some_percent = max(some_percent, float(self._settings.medium_percent))
        return Look(self._level, source, system, groups, some_percent)

    def hear(self, kind: StallKind) -> None:
        """A trigger of the kernel's has fired: it can raise the level, never lower it."""
        level = _LEVEL_OF[kind]
        self._heard_at_s[level] = self._clock()
        self._set(max(self._level, level, key=rank))

    def level_of(self, kind: StallKind, percent: float) -> Level:
        """What a share of time in which some or all tasks stalled means by itself."""
        if kind == "full" and percent >= self._settings.critical_percent:
            return "critical"
        return "medium" if percent >= self._settings.medium_percent else "low"

    async def run(self, events: Events) -> None:
        """Follow it until cancelled."""
        told = Subscription(frozenset({"BALLAST_BALLOON"}), self._note_inflating)
        events.subscribe(told)
        self._groups.watch(self.hear)
        system = [] if self._groups.is_armed else self._arm_system()
        try:
            while True:
                await self._pressed.wait()
                while self._level != "low":
                    await asyncio.sleep(self._window_s)
                    self.look()
                self._pressed.clear()
        finally:
            events.unsubscribe(told)
            self._groups.close()
            for trigger in system:
                trigger.close()

    def _by_share(self, some_percent: float, full_percent: float) -> Level:
        """The level by averages. One that it has is kept until they are below a part of what it takes to get there."""
        settings, kept = self._settings, self._settings.ease_percent / 100
        if full_percent >= settings.critical_percent * (kept if self._level == "critical" else 1):
            return "critical"
        if some_percent >= settings.medium_percent * (kept if self._level != "low" else 1):
            return "medium"
        return "low"

    def _heard(self) -> Level:
        """The highest level of which a trigger has told lately."""
        since_s = self._clock() - HELD_WINDOWS * self._window_s
        return max((level for level, at_s in self._heard_at_s.items() if at_s > since_s), key=rank, default="low")

    def _hear_system(self, kind: StallKind) -> None:
        if not self._is_inflating():
            self.hear(kind)

    def _is_inflating(self) -> bool:
        return self._clock() < self._inflated_at_s + self._window_s

    def _note_inflating(self, event: Event) -> bool:
        if event.data["cause"] == "inflate":
            self._inflated_at_s = self._clock()
        return True

    def _set(self, level: Level) -> None:
        if level != self._level:
            self._level = level
            self._changed(level)
        if level != "low":
            self._pressed.set()

    def _arm_system(self) -> list[Trigger]:
        triggers: list[Trigger] = []
        path = self._tree.path(PRESSURE_FILE)
        for wanted in self._triggers:
            try:
                triggers.append(Trigger(path, wanted, partial(self._hear_system, wanted.kind)))
            except OSError as error:
                log.warning("no pressure events: %s; the pressure level is renewed at readings only", error)
                break
        return triggers


def rank(level: Level) -> int:
    """Higher is worse."""
    return _RANK[level]


def read_system(tree: Tree) -> StallFile | None:
    """The system-wide figure; None without PSI (CONFIG_PSI, ``psi=0``)."""
    try:
        return parse_stalls(tree.read(PRESSURE_FILE))
    except (OSError, ValueError):
        return None
