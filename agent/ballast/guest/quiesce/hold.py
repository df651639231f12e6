"""One session, from the choice of its file systems to the moment when nothing of it is left frozen.

A task of its own runs it; peers only wait for what it brings about, so that a peer that goes away changes nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

from ballast.guest.config import Quiesce as Settings
from ballast.guest.quiesce.forecast import Plan
from ballast.guest.quiesce.guard_client import GuardConnection
from ballast.guest.quiesce.guard_protocol import boottime_s
from ballast.guest.quiesce.net import Net
from ballast.guest.quiesce.outcome import Outcome, end_reason
from ballast.guest.quiesce.outlook import Outlook
from ballast.guest.quiesce.prelude import Order, Prelude, Ready
from ballast.guest.quiesce.writers import Writers
from ballast.wire.errors import AgentError, DeadlineExceeded, KernelFailure, LeaseExpired
from ballast.wire.names import EndReason, QuiesceBegun, QuiesceEnded

log = logging.getLogger(__name__)

THAW_S = 5.0  # how long the guard may take over an ordered thaw before the net does it
_ENDED_EARLY = "the session was ended before it was frozen"


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What a hold needs of its owner.

    ``opening(guard's pid, file systems)`` is called before the first ioctl, ``changed(hold, why it did not hold)`` at
    every step.
    """

    settings: Settings
    outlook: Outlook
    guard_path: str
    opening: Callable[[Hold, int], None]
    changed: Callable[[Hold, EndReason | None], None]


class Hold:
    """``begun`` and ``ended`` bring the two answers; when ``run`` returns nothing is left to thaw."""

    def __init__(self, order: Order, plan: Plan, writers: Writers, around: Surroundings) -> None:
        loop = asyncio.get_running_loop()
        self.order = order
        self.plan = plan
        self.outcome = Outcome(plan)
        self.writers = writers
        self.state: Literal["thawed", "freezing", "frozen", "thawing"] = "freezing"
        self.expires_s = 0.0
        self.begun: asyncio.Future[QuiesceBegun] = loop.create_future()
        self.ended: asyncio.Future[QuiesceEnded] = loop.create_future()
        self._around = around
        self._prelude = Prelude(
            order, self.outcome, plan, writers, around.settings, guard_path=around.guard_path, outlook=around.outlook
        )
        self._resources = contextlib.ExitStack()
        self._guard: GuardConnection | None = None
        self._net: Net | None = None
        self._impatience: asyncio.TimerHandle | None = None
        self._renewed: asyncio.Future[None] | None = None
        self._preparing: asyncio.Future[Ready] | None = None
        self._ender: EndReason | None = None
        self._end_ordered_s: float | None = None
        self._frozen_at_s: float | None = None

    @property
    def is_holding(self) -> bool:
        """Whether something may be frozen: until the last FITHAW, and while a FIFREEZE still waits for a writer."""
        return not self.ended.done() or bool(self.outcome.in_state("freezing"))

    def left_to_thaw(self) -> list[dict[str, Any]]:
        """What a cleaner has to thaw, in the record's form: not what a stranger has frozen."""
        left = {one.mountpoint for one in self.outcome.filesystems if one.state in ("freezing", "frozen")}
        ours = [filesystem for filesystem in self.plan.filesystems if filesystem.mountpoint in left]
        return [{"mountpoints": list(one.mountpoints), "device": one.device} for one in ours]

    async def run(self) -> None:
        """Freeze, hold and thaw. Never raises: what goes wrong is told by the two futures."""
        try:
            with self._resources:
                try:
                    await self._live()
                finally:
                    await self._leave_writers()
        except AgentError as error:
            self._fail(error)
        except Exception as error:  # a bug: the connection is closed, so the guard thaws
            log.exception("freeze %s failed", self.order.id)
            self._fail(AgentError(f"internal error: {error}"))
        self.state = "thawed"

    def order_end(self, reason: EndReason | None = None) -> None:
        """Have it thawed; ``reason`` if it was not its owner who asked. At any time, more than once."""
        if self._end_ordered_s is not None:
            return
        self._end_ordered_s = boottime_s()
        self._ender = reason
        if self._preparing is not None:
            self._preparing.cancel()
        if self._guard is not None and self._net is not None:
            self._guard.send({"op": "thaw"})
            self._impatience = asyncio.get_running_loop().call_later(THAW_S, self._net.fire)
            self._resources.callback(self._impatience.cancel)

    async def renew(self, lease_s: float) -> None:
        """Move the lease's end to ``lease_s`` from now. LeaseExpired if that end came first, DeadlineExceeded."""
        if self.state != "frozen" or self._guard is None or self._net is None or self._end_ordered_s is not None:
            raise LeaseExpired("the freeze has ended")
        expires_s = boottime_s() + lease_s
        self._renewed = asyncio.get_running_loop().create_future()
        self._net.expires_s = max(self._net.expires_s, expires_s)
        self._guard.send({"op": "renew", "expires_s": expires_s})
        try:
            async with asyncio.timeout(THAW_S):
                await self._renewed
        except TimeoutError as error:
            raise DeadlineExceeded("the guard does not answer") from error
        self.expires_s = self._net.expires_s = expires_s

    # The life of a hold, in order.

    async def _live(self) -> None:
        ready = await self._prepare_unless_ended()
        self._guard = guard = ready.guard
        if self._end_ordered_s is not None:
            raise LeaseExpired(_ENDED_EARLY)
        self._around.opening(self, guard.pid)
        started_s = boottime_s()
        self.expires_s = started_s + self.order.lease_s
        self._start(guard, ready.fds)
        self._around.changed(self, None)
        await self._freeze(started_s + min(self._around.settings.freeze_timeout_ms / 1000, self.order.lease_s))
        self._frozen_at_s = boottime_s()
        self.state = "frozen"
        self.begun.set_result(self._answer(ready, self._frozen_at_s - started_s))
        self._around.changed(self, None)
        await self._end()

    async def _prepare_unless_ended(self) -> Ready:
        """Prepare; an end does not wait until a disk that hangs has taken what is written out."""
        self._preparing = asyncio.ensure_future(self._prelude.run(self._resources))
        try:
            await asyncio.wait({self._preparing})
        finally:
            self._preparing.cancel()
        if self._preparing.cancelled():
            raise LeaseExpired(_ENDED_EARLY)
        return self._preparing.result()

    def _start(self, guard: GuardConnection, fds: list[int]) -> None:
        """Arm the net, then let the guard begin."""
        loop = asyncio.get_running_loop()

        def fired(thawed: dict[int, bool]) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: the agent is leaving
                loop.call_soon_threadsafe(guard.inject, {"event": "net", "thawed": thawed})

        self._net = Net(fds, guard, self.expires_s, fired)
        self._resources.callback(self._net.close)
        position = {filesystem.device: index for index, filesystem in enumerate(self.plan.filesystems)}
        levels = [[position[filesystem.device] for filesystem in level] for level in self.plan.levels]
        guard.send({"op": "freeze", "levels": levels, "expires_s": self.expires_s}, fds)

    async def _freeze(self, deadline_s: float) -> None:
        """Wait until all are frozen; otherwise thaw and raise, naming the culprits."""
        with contextlib.suppress(DeadlineExceeded):
            while True:
                message = await self._receive(max(0.0, deadline_s - boottime_s()))
                if message["event"] in ("thawed", "net"):
                    cause = str(message.get("cause", "guard-lost"))
                    await self._lose(
                        message, LeaseExpired("the freeze ended before everything was frozen", cause=cause)
                    )
                if self.outcome.in_state("failed") and not self.order.degrade:
                    break
                if message["event"] == "frozen":
                    return
        if self.order.degrade:
            return
        error = self._accuse()
        self.order_end()
        await self._lose(await self._until("thawed", "net"), error)

    async def _lose(self, final: dict[str, Any], error: AgentError) -> NoReturn:
        """All that could be thawed is: say what went wrong."""
        await self._conclude(final)
        self.begun.set_exception(error)
        await self._linger()
        raise error

    def _accuse(self) -> AgentError:
        if failed := self.outcome.in_state("failed"):
            desc = "; ".join(f"failed to freeze {one.mountpoint}: {one.reason}" for one in failed)
            return KernelFailure(desc, operation="freeze", mountpoints=[one.mountpoint for one in failed])
        stuck = [one.mountpoint for one in self.outcome.in_state("freezing")]
        return DeadlineExceeded(f"failed to freeze {', '.join(stuck)}: a writer is still running", mountpoints=stuck)

    async def _end(self) -> None:
        await self._conclude(await self._until("thawed", "net"))
        await self._linger()

    async def _linger(self) -> None:
        """Stay until no freeze is left that still waits for a writer: the net must outlast it."""
        while self.outcome.in_state("freezing"):
            await self._until("idle", "net")
            self.outcome.all_thawed()

    async def _until(self, *events: str) -> dict[str, Any]:
        while (message := await self._receive(None))["event"] not in events:
            pass
        return message

    async def _receive(self, timeout_s: float | None) -> dict[str, Any]:
        """Next message of guard or net; what it says of single file systems is already taken in."""
        assert self._guard is not None
        message = await self._guard.receive(timeout_s=timeout_s)
        if message["event"] == "settled":
            self.outcome.settle(message)
            if message["state"] == "failed" and self._net is not None:
                self._net.forget(message["index"])
        elif message["event"] == "renewed" and self._renewed is not None and not self._renewed.done():
            self._renewed.set_result(None)
        return message

    def _answer(self, ready: Ready, freeze_s: float) -> QuiesceBegun:
        return QuiesceBegun(
            id=self.order.id,
            consistency=self._consistency(),
            lease_ms=round(1000 * self.order.lease_s),
            sync_ms=round(1000 * ready.sync_s, 3),
            freeze_ms=round(1000 * freeze_s, 3),
            filesystems=self.outcome.filesystems,
            writers=self.writers.results,
            risks=ready.risks,
            dirty_bytes=ready.dirty_bytes,
        )

    def _consistency(self) -> Literal["application", "filesystem", "none"]:
        if not self.outcome.is_whole:
            return "none"
        return "application" if self.writers.are_consistent else "filesystem"

    async def _conclude(self, final: dict[str, Any]) -> None:
        """Take in how the thaw went, have the writers undone, and answer whoever asks for the end."""
        broken = False
        if final["event"] == "net":
            self.outcome.all_thawed()
        else:
            broken = self.outcome.thawed_by_guard(final["filesystems"])
            self._trust_guard()
        now_s = boottime_s()
        reason = end_reason(final, broken=broken, expired=now_s >= self.expires_s, ender=self._ender)
        if reason is None and self._frozen_at_s is None and now_s >= self.expires_s:
            reason = "lease-expired"  # given up in the same moment
        self.state = "thawing"
        await self.writers.undo("abort" if self._frozen_at_s is None else "thaw")
        if reason is None and self.writers.lost:
            reason = "writer-lost"
        self.ended.set_result(
            QuiesceEnded(
                held=reason is None and self._frozen_at_s is not None and not self.outcome.in_state("frozen"),
                held_ms=round(1000 * (now_s - (self._frozen_at_s or now_s)), 3),
                thaw_ms=round(1000 * (now_s - (self._end_ordered_s or now_s)), 3),
                reason=reason,
                filesystems=self.outcome.filesystems,
                writers=self.writers.results,
            )
        )
        self._around.changed(self, reason)

    async def _leave_writers(self) -> None:
        """Whatever happened: none of them holds anything for us any more."""
        if self._guard is not None:
            self._guard.send({"op": "thaw"})  # nothing, unless we come here by a bug
        await self.writers.undo("abort")
        held = self.ended.result().held if self.ended.done() and not self.ended.cancelled() else None
        await self.writers.leave(held=held)

    def _trust_guard(self) -> None:
        """It has thawed; what still waits for a writer it thaws too, unless it dies: then the net does."""
        if self._net is not None:
            self._net.expires_s = math.inf
        if self._impatience is not None:
            self._impatience.cancel()

    def _fail(self, error: AgentError) -> None:
        for future in (self.begun, self.ended):
            if not future.done():
                future.set_exception(error)
                future.exception()  # seen: it is no fault if nobody asks
