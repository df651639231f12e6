"""Memory pressure from PSI: readings, levels, and events that the kernel sends instead of us asking.

Documentation/accounting/psi.rst. A trigger fires at most once a window and shows as POLLPRI, which asyncio's own
selector does not ask for: each trigger lives in an epoll of its own, itself watched by the event loop. To look at a
trigger is to use up its event (psi_trigger_poll in kernel/sched/psi.c), and the loop's epoll looks through ours: that
ours is readable is all there will be to see, and asking it again finds nothing. So there is one for each trigger.
"""

from __future__ import annotations

import asyncio
import logging
import os
import select
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ballast.guest.events import Subscription
from ballast.guest.linux import psi
from ballast.guest.linux.tree import Tree
from ballast.wire.errors import AgentError, BadRequest, Busy, KernelFailure, NotSupported
from ballast.wire.memory_names import Level, PsiTrigger

log = logging.getLogger(__name__)

PRESSURE_FILE = "proc/pressure/memory"
DEFAULT_TRIGGERS = (PsiTrigger("some", 150_000, 1_000_000), PsiTrigger("full", 100_000, 1_000_000))
STALL_PERCENT = 10.0  # from here on ``some`` means medium and ``full`` critical


def level_of(some_percent: float, full_percent: float) -> Level:
    """The level for the shares of time that some task, and every task, was stalled."""
    if full_percent >= STALL_PERCENT:
        return "critical"
    return "medium" if some_percent >= STALL_PERCENT else "low"


@dataclass(frozen=True, slots=True, eq=False)
class _Armed:
    fd: int
    epoll: select.epoll
    trigger: PsiTrigger
    subscription: Subscription
    is_ours: bool


class Pressure:
    """The guest's memory pressure. Without PSI in the kernel readings are None and watching is refused."""

    def __init__(self, tree: Tree, *, max_triggers: int) -> None:
        self._tree = tree
        self._max_triggers = max_triggers
        self._armed: set[_Armed] = set()

    @property
    def is_available(self) -> bool:
        """Whether the kernel measures it (CONFIG_PSI, and not switched off by ``psi=0``)."""
        return self.read() is not None

    def read(self) -> psi.StallFile | None:
        """Current reading; None without PSI."""
        try:
            return psi.parse_stalls(self._tree.read(PRESSURE_FILE))
        except (OSError, ValueError):
            return None

    def level(self) -> Level:
        """The level by the ten-second averages; "low" without PSI."""
        now = self.read()
        return level_of(now.some.avg10, now.full.avg10) if now else "low"

    def watch(self, triggers: Sequence[PsiTrigger] | None, subscription: Subscription) -> Callable[[], None]:
        """Arm triggers for a subscriber and return what disarms them. Never blocks.

        With None the default ones; where the kernel has no PSI or refuses them, such a subscriber just hears no
        pressure. BadRequest, NotSupported, Busy (too many), KernelFailure.
        """
        for trigger in triggers or ():
            _check(trigger)
        theirs = sum(1 for armed in self._armed if not armed.is_ours)
        if theirs + len(DEFAULT_TRIGGERS if triggers is None else triggers) > self._max_triggers:
            raise Busy(f"more than {self._max_triggers} pressure triggers", limit=self._max_triggers)
        if triggers is None:
            return self._arm_if_possible(DEFAULT_TRIGGERS, subscription, is_ours=False)
        return self._arm_all(triggers, subscription, is_ours=False)

    def watch_for_us(
        self, subscription: Subscription, triggers: Sequence[PsiTrigger] = DEFAULT_TRIGGERS
    ) -> Callable[[], None]:
        """Arm triggers for a part of the agent: peers cannot use these up. Never blocks, never raises."""
        return self._arm_if_possible(triggers, subscription, is_ours=True)

    def _arm_if_possible(
        self, triggers: Sequence[PsiTrigger], subscription: Subscription, *, is_ours: bool
    ) -> Callable[[], None]:
        try:
            return self._arm_all(triggers, subscription, is_ours=is_ours)
        except (NotSupported, KernelFailure) as error:
            log.warning("no pressure events for %s: %s", "ourselves" if is_ours else "a subscriber", error.desc)
            return lambda: None

    def _arm_all(
        self, triggers: Sequence[PsiTrigger], subscription: Subscription, *, is_ours: bool
    ) -> Callable[[], None]:
        armed: list[_Armed] = []
        try:
            for trigger in triggers:
                one = self._arm(trigger, subscription, is_ours=is_ours)
                armed.append(one)
        except AgentError:
            self._disarm(armed)
            raise
        return lambda: self._disarm(armed)

    def _arm(self, trigger: PsiTrigger, subscription: Subscription, *, is_ours: bool) -> _Armed:
        path = self._tree.path(PRESSURE_FILE)
        try:
            fd = psi.open_trigger(path, trigger.kind, stall_us=trigger.stall_us, window_us=trigger.window_us)
        except FileNotFoundError as error:
            raise NotSupported("this kernel has no pressure stall information") from error
        except OSError as error:
            raise KernelFailure.of("arm a trigger on", path, error) from error
        armed = _Armed(fd, select.epoll(), trigger, subscription, is_ours)
        armed.epoll.register(fd, select.EPOLLPRI)
        asyncio.get_running_loop().add_reader(armed.epoll.fileno(), self._fire, armed)
        self._armed.add(armed)
        return armed

    def _disarm(self, triggers: Sequence[_Armed]) -> None:
        for armed in triggers:
            if armed in self._armed:
                self._armed.remove(armed)
                asyncio.get_running_loop().remove_reader(armed.epoll.fileno())
                armed.epoll.close()
                os.close(armed.fd)

    def _fire(self, armed: _Armed) -> None:
        now = self.read()
        if armed not in self._armed or now is None:
            return
        trigger = armed.trigger
        # The averages lag by seconds; the trigger itself says what the last window was like.
        percent = 100.0 * trigger.stall_us / trigger.window_us
        full_percent = max(now.full.avg10, percent if trigger.kind == "full" else 0.0)
        data = {
            "level": level_of(max(now.some.avg10, percent), full_percent),
            "kind": trigger.kind,
            "stall-us": trigger.stall_us,
            "window-us": trigger.window_us,
            "some-avg10": now.some.avg10,
            "full-avg10": now.full.avg10,
        }
        if not armed.subscription.send("BALLAST_PRESSURE", data):
            self._disarm([armed])


def _check(trigger: PsiTrigger) -> None:
    if not psi.WINDOW_MIN_US <= trigger.window_us <= psi.WINDOW_MAX_US:
        raise BadRequest(
            f"Parameter 'psi.window-us' expects {psi.WINDOW_MIN_US} to {psi.WINDOW_MAX_US}", argument="psi.window-us"
        )
    if not 0 < trigger.stall_us <= trigger.window_us:
        raise BadRequest("Parameter 'psi.stall-us' expects 1 to window-us", argument="psi.stall-us")
