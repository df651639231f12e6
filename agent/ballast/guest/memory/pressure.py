"""Memory pressure of the whole system, as events that the kernel sends instead of us asking.

Documentation/accounting/psi.rst. Triggers are on the system-wide file, which has our own stalls in it; the level that
an event tells of has not: see ``level``.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from functools import partial

from ballast.guest.events import Subscription
from ballast.guest.linux import psi
from ballast.guest.linux.tree import Tree
from ballast.guest.memory.groups import OUR_FILE
from ballast.guest.memory.level import PressureLevel, rank, read_system
from ballast.guest.memory.trigger import Trigger
from ballast.wire.errors import AgentError, BadRequest, Busy, KernelFailure, NotSupported
from ballast.wire.memory_names import Level, PsiTrigger, StallKind

log = logging.getLogger(__name__)

DEFAULT_TRIGGERS = (PsiTrigger("some", 150_000, 1_000_000), PsiTrigger("full", 100_000, 1_000_000))


class Pressure:
    """The triggers of peers, and of parts of the agent. Without PSI in the kernel watching is refused."""

    def __init__(self, tree: Tree, level: PressureLevel, *, max_triggers: int) -> None:
        self._tree = tree
        self._level = level
        self._max_triggers = max_triggers
        self._theirs: set[Trigger] = set()

    @property
    def is_available(self) -> bool:
        """Whether the kernel measures it (CONFIG_PSI, and not switched off by ``psi=0``)."""
        return read_system(self._tree) is not None

    def watch(self, triggers: Sequence[PsiTrigger] | None, subscription: Subscription) -> Callable[[], None]:
        """Arm triggers for a subscriber and return what disarms them. Never blocks.

        With None the default ones; where the kernel has no PSI or refuses them, such a subscriber just hears no
        pressure. BadRequest, NotSupported, Busy (too many), KernelFailure.
        """
        for trigger in triggers or ():
            _check(trigger)
        if len(self._theirs) + len(DEFAULT_TRIGGERS if triggers is None else triggers) > self._max_triggers:
            raise Busy(f"more than {self._max_triggers} pressure triggers", limit=self._max_triggers)
        armed = (
            self._arm_if_possible(DEFAULT_TRIGGERS, subscription, "a subscriber")
            if triggers is None
            else self._arm_all(triggers, subscription)
        )
        self._theirs.update(armed)

        def disarm() -> None:
            self._theirs.difference_update(armed)
            _close(armed)

        return disarm

    def watch_for_us(
        self, subscription: Subscription, triggers: Sequence[PsiTrigger] = DEFAULT_TRIGGERS
    ) -> Callable[[], None]:
        """Arm triggers for a part of the agent: peers cannot use these up. Never blocks, never raises."""
        return partial(_close, self._arm_if_possible(triggers, subscription, "ourselves"))

    def _arm_if_possible(
        self, triggers: Sequence[PsiTrigger], subscription: Subscription, whom: str
    ) -> Sequence[Trigger]:
        try:
            return self._arm_all(triggers, subscription)
        except (NotSupported, KernelFailure) as error:
            log.warning("no pressure events for %s: %s", whom, error.desc)
            return ()

    def _arm_all(self, triggers: Sequence[PsiTrigger], subscription: Subscription) -> Sequence[Trigger]:
        armed: list[Trigger] = []
        try:
            for trigger in triggers:
                one = self._arm(trigger, subscription)
                armed.append(one)
        except AgentError:
            _close(armed)
            raise
        return armed

    def _arm(self, wanted: PsiTrigger, subscription: Subscription) -> Trigger:
        path = self._tree.path(psi.PRESSURE_FILE)
        ours = _Ours(self._tree, wanted.kind)

        def fire() -> None:
            if self._tell(wanted, subscription, ours):
                asyncio.get_running_loop().call_soon(ours.note)
            else:
                trigger.close()

        try:
            trigger = Trigger(path, wanted, fire)
        except FileNotFoundError as error:
            raise NotSupported("this kernel has no pressure stall information") from error
        except OSError as error:
            raise KernelFailure.of("arm a trigger on", path, error) from error
        return trigger

    def _tell(self, trigger: PsiTrigger, subscription: Subscription, ours: _Ours) -> bool:
        """Send the event; False if nobody takes it. What can be done later is: it is to be told within milliseconds."""
        now = read_system(self._tree)
        if now is None:
            return True
        data = {
            "level": self._level_at(trigger, ours),
            "kind": trigger.kind,
            "stall-us": trigger.stall_us,
            "window-us": trigger.window_us,
            "some-avg10": now.some.avg10,
            "full-avg10": now.full.avg10,
        }
        return subscription.send("BALLAST_PRESSURE", data)

    def _level_at(self, trigger: PsiTrigger, ours: _Ours) -> Level:
        """The averages lag by seconds; the trigger itself says what the last window was like, without our own share."""
        level = self._level.level_of(trigger.kind, 100 * trigger.stall_us / trigger.window_us)
        if rank(level) > rank(self._level.now):
            theirs_us = max(0, trigger.stall_us - ours.since_us())
            level = self._level.level_of(trigger.kind, 100 * theirs_us / trigger.window_us)
        return max(level, self._level.now, key=rank)


class _Ours:
    """How long our own processes have stalled: 0 where the kernel does not tell."""

    def __init__(self, tree: Tree, kind: StallKind) -> None:
        self._tree = tree
        self._kind = kind
        self._noted_us = self._read_us()

    def note(self) -> None:
        """Count from now on."""
        self._noted_us = self._read_us()

    def since_us(self) -> int:
        """Since the last event, which is more than in its window."""
        return self._read_us() - self._noted_us

    def _read_us(self) -> int:
        try:
            ours = psi.parse_stalls(self._tree.read(OUR_FILE))
        except (OSError, ValueError):
            return 0
        return (ours.some if self._kind == "some" else ours.full).total_us


def _close(triggers: Sequence[Trigger]) -> None:
    for trigger in triggers:
        trigger.close()


def _check(trigger: PsiTrigger) -> None:
    if not psi.WINDOW_MIN_US <= trigger.window_us <= psi.WINDOW_MAX_US:
        raise BadRequest(
            f"Parameter 'psi.window-us' expects {psi.WINDOW_MIN_US} to {psi.WINDOW_MAX_US}", argument="psi.window-us"
        )
    if not 0 < trigger.stall_us <= trigger.window_us:
        raise BadRequest("Parameter 'psi.stall-us' expects 1 to window-us", argument="psi.stall-us")
