"""Everything before the first ioctl: all that needs a working disk, the bus or PID 1.

Writers get ready while file systems are opened and written out; then they hold, and what they have written last is
written out too.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from dataclasses import dataclass

from ballast.guest.config import Quiesce as Settings
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
SMALL_BYTES = 4 << 20  # so much is soon written, and each pass holds writers up for a moment as well
# Where more is dirty writers are not slowed down before the first pass: they would stand still until all is written.
SOON_BYTES = 128 << 20
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

    async def run(self, resources: contextlib.ExitStack) -> Ready:
        """Get ready; what must be let go of later goes to ``resources``. AgentError, and then writers want undoing."""
        connecting = asyncio.ensure_future(self._connect(resources))
        opening = asyncio.ensure_future(self._open(resources))
        looking = asyncio.ensure_future(self._look())
        try:
            await self._writers.start()
            guard = await connecting
            guard.keep(self._writers.lifelines())
            fds = await opening
            self._check_writers()
            # Not later: it asks PID 1, and nothing that is written meanwhile is left for the freeze to write.
            risks = await looking
            return Ready(fds, await self._settle(fds, guard), self._outlook.dirty_bytes(), guard, risks)
        except BaseException:
            for task in (connecting, opening, looking):
                task.cancel()
            await asyncio.gather(connecting, opening, looking, return_exceptions=True)
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

    async def _settle(self, fds: list[int], guard: GuardConnection) -> float:
        """Have applications hold and everything written out; seconds spent on the latter."""
        left_s = timeout_s = self._settings.sync_timeout_ms / 1000
        mountpoints = [filesystem.mountpoint for filesystem in self._plan.filesystems]
        if self._is_dirty(SMALL_BYTES) and not self._is_dirty(SOON_BYTES):
            guard.limit_dirty()
        sync_s, _ = await asyncio.gather(
            sync_filesystems(fds, timeout_s=left_s),
            self._writers.prepare(mountpoints, round(1000 * self._order.lease_s)),
        )
        left_s -= sync_s
        self._check_writers()
        if self._is_dirty(SMALL_BYTES):
            guard.limit_dirty()
            left_s -= await sync_filesystems(fds, timeout_s=left_s)
        await self._writers.freeze()
        self._check_writers()
        if self._is_dirty(SMALL_BYTES):
            left_s -= await sync_filesystems(fds, timeout_s=min(left_s, SYNC_HELD_S))
        return timeout_s - left_s

    def _is_dirty(self, above_bytes: int) -> bool:
        dirty_bytes = self._outlook.dirty_bytes()
        return dirty_bytes is None or dirty_bytes > above_bytes

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
