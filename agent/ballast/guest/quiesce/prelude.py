"""Everything before the first ioctl: all that needs a working disk, the bus or PID 1.

Writers get ready while file systems are opened and written out; then they hold, and what they have written last is
written out too. More passes than that bring nothing: what is left is what may be dirty at any time.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
from collections.abc import Awaitable
from dataclasses import dataclass

from ballast.guest.config import Quiesce as Settings
from ballast.guest.linux.writeback import LEAST_BYTES
from ballast.guest.quiesce.forecast import Plan
from ballast.guest.quiesce.guard_client import GuardConnection
from ballast.guest.quiesce.outcome import Outcome
from ballast.guest.quiesce.outlook import Outlook
from ballast.guest.quiesce.prepare import open_filesystems, sync_filesystems
from ballast.guest.quiesce.writers import Writers
from ballast.wire.errors import AgentError, DeadlineExceeded, WriterRefused
from ballast.wire.names import Risk
from ballast.wire.shape import to_wire

log = logging.getLogger(__name__)

GUARD_START_S = 30.0  # enough for a stuck one to be killed and the next to start
LOOK_S = 2.0  # how long whoever is asked for a risk may keep a freeze waiting
LOOKED_S = 300.0  # how long what others told before is good enough not to wait at all
SYNC_HELD_S = 2.0  # how long an application is held for the little that it has just written


@dataclass(frozen=True, slots=True)
class Order:
    """What was asked for. ``degrade``: hold what could be frozen, although something could not."""

    id: str
    lease_s: float
    degrade: bool = False


@dataclass(frozen=True, slots=True)
class Ready:
    """What a freeze begins with."""

    fds: list[int]
    sync_s: float
    dirty_bytes: int | None
    guard: GuardConnection
    risks: list[Risk]


class Prelude:
    """One session's."""

    def __init__(
        self,
        order: Order,
        outcome: Outcome,
        plan: Plan,
        writers: Writers,
        settings: Settings,
        *,
        guard_path: str,
        outlook: Outlook,
    ) -> None:
        self._order = order
        self._outcome = outcome
        self._plan = plan
        self._writers = writers
        self._settings = settings
        self._guard_path = guard_path
        self._outlook = outlook
        self._sync_s = 0.0

    async def run(self, resources: contextlib.ExitStack) -> Ready:
        """Get ready; what must be let go of later goes to ``resources``. AgentError, and then writers want undoing."""
        # First of all, so that most is written while writers are started.
        guard, fds = await self._connect_and_open(resources)
        syncing = asyncio.ensure_future(self._sync_most(fds, guard))
        looking = asyncio.ensure_future(self._look())
        try:
            await self._writers.start()
            guard.keep(self._writers.lifelines())
            self._check_writers()
            await self._have_writers_hold(fds, guard, syncing)
            return Ready(fds, self._sync_s, self._outlook.dirty_bytes(), guard, await looking)
        except BaseException:
            for task in (looking, syncing):
                task.cancel()
            await asyncio.gather(looking, syncing, return_exceptions=True)
            raise

    async def _connect_and_open(self, resources: contextlib.ExitStack) -> tuple[GuardConnection, list[int]]:
        connecting = asyncio.ensure_future(self._connect(resources))
        opening = asyncio.ensure_future(self._open(resources))
        try:
            return await connecting, await opening
        except BaseException:
            connecting.cancel()
            opening.cancel()
            await asyncio.gather(connecting, opening, return_exceptions=True)
            raise

    async def _look(self) -> list[Risk]:
        """Foresee what may go wrong; that it cannot be foreseen is no reason not to freeze."""
        try:
            risks = await self._outlook.risks(self._plan, self._order.lease_s, timeout_s=LOOK_S, max_age_s=LOOKED_S)
        except AgentError as error:
            log.warning("freeze %s: no forecast: %s", self._order.id, error.desc)
            return []
        for risk in risks:
            log.warning(
                "freeze %s: %s: %s", self._order.id, risk.kind, risk.detail, extra={"FREEZE_ID": self._order.id}
            )
        return risks

    async def _connect(self, resources: contextlib.ExitStack) -> GuardConnection:
        guard = await GuardConnection.open(self._guard_path, timeout_s=GUARD_START_S)
        resources.callback(guard.close)
        resources.callback(guard.release)  # as long as we live, the writers are ours to undo
        return guard

    async def _open(self, resources: contextlib.ExitStack) -> list[int]:
        fds = await open_filesystems(self._plan.filesystems, timeout_s=self._settings.open_timeout_ms / 1000)
        for fd in fds:
            resources.callback(os.close, fd)
        return fds

    async def _sync_most(self, fds: list[int], guard: GuardConnection) -> None:
        if self._is_dirty():
            guard.limit_dirty()
        await self._sync(fds)

    async def _have_writers_hold(self, fds: list[int], guard: GuardConnection, syncing: Awaitable[None]) -> None:
        """Have applications hold, with as little as can be left to be written."""
        mountpoints = [filesystem.mountpoint for filesystem in self._plan.filesystems]
        await asyncio.gather(syncing, self._writers.prepare(mountpoints, round(1000 * self._order.lease_s)))
        self._check_writers()
        if self._is_dirty():
            guard.limit_dirty()
            await self._sync(fds)
        await self._writers.freeze()
        self._check_writers()
        if self._writers.are_present and self._is_dirty():
            await self._sync(fds, timeout_s=SYNC_HELD_S)

    async def _sync(self, fds: list[int], *, timeout_s: float = math.inf) -> None:
        """Write out what is dirty, within what is left of the time for it."""
        left_s = self._settings.sync_timeout_ms / 1000 - self._sync_s
        self._sync_s += await sync_filesystems(fds, timeout_s=max(0.0, min(left_s, timeout_s)))

    def _is_dirty(self) -> bool:
        dirty_bytes = self._outlook.dirty_bytes()
        return dirty_bytes is None or dirty_bytes > LEAST_BYTES

    def _check_writers(self) -> None:
        """WriterRefused or DeadlineExceeded if a critical one failed, unless the host takes what it can get."""
        obstacles = self._writers.obstacles
        if self._order.degrade or not obstacles:
            return
        desc = "; ".join(f"writer {one.name} {one.reason}" for one in obstacles)
        if skipped := self._outcome.skipped:
            desc += "; left out: " + ", ".join(f"{one.mountpoint} ({one.reason})" for one in skipped)
        kind = DeadlineExceeded if any(one.state == "timed-out" for one in obstacles) else WriterRefused
        raise kind(desc, writers=to_wire(self._writers.results), filesystems=to_wire(self._outcome.filesystems))
