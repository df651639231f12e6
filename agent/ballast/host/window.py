"""A frozen window: file systems of a guest frozen under a lease that is renewed while something is done meanwhile.

The freeze belongs to its id, not to a connection: a lost connection is made anew, to renew and to end it.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Self, TypeVar

from ballast.host.agent import Agent, OnFailure, QuiesceLevel
from ballast.host.connect import PeerGone
from ballast.host.connection import NotUnderstood
from ballast.wire.errors import AgentError
from ballast.wire.names import QuiesceBegun, QuiesceEnded

T = TypeVar("T")

LEASE_LEAST_S = 1.0
# An agent that restarts or a daemon that is upgraded is back by then, and then tells whether the freeze held.
END_PATIENCE_S = 30.0
RETRY_S = 1.0


@dataclass(frozen=True, slots=True)
class FreezePlan:
    """What to freeze, and for how long at most: each lease, and all of them together."""

    lease_s: float = 30.0
    max_hold_s: float = 600.0
    mountpoints: Sequence[str] | None = None
    exclude: Sequence[str] | None = None
    level: QuiesceLevel | None = None
    on_failure: OnFailure | None = None


class FrozenWindow:
    """One freeze. ``async with`` thaws on the way out what ``begin`` froze, however one leaves.

    ``tell`` gets what a person should know meanwhile: that the connection was lost, that the lease runs out.
    """

    def __init__(
        self,
        connect: Callable[[], AbstractAsyncContextManager[Agent]],
        plan: FreezePlan,
        tell: Callable[[str], None],
    ) -> None:
        self.id = str(uuid.uuid4())
        self.begun: QuiesceBegun | None = None
        self.ended: QuiesceEnded | None = None
        self._connect = connect
        self._plan = plan
        self._tell = tell
        self._connection = AsyncExitStack()
        self._agent: Agent | None = None
        self._renewing: asyncio.Task[None] | None = None
        self._to_thaw = False

    async def __aenter__(self) -> Self:
        await self._ensure_connected()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if self._to_thaw:
                await self.end()
        finally:
            await self._stop_renewing()
            await self._disconnect()

    async def begin(self) -> QuiesceBegun:
        """Freeze, and renew the lease from now on. AgentError's classes: nothing is frozen then."""
        plan = self._plan
        self._to_thaw = True
        try:
            self.begun = await self._ask(
                lambda agent: agent.quiesce_begin(
                    self.id,
                    round(1000 * min(plan.lease_s, plan.max_hold_s)),
                    mountpoints=plan.mountpoints,
                    exclude=plan.exclude,
                    level=plan.level,
                    on_failure=plan.on_failure,
                )
            )
        except (PeerGone, NotUnderstood):
            raise  # it may yet freeze, or has
        except AgentError:
            self._to_thaw = False
            raise
        self._renewing = asyncio.create_task(self._renew())
        return self.begun

    async def end(self) -> QuiesceEnded:
        """Thaw, and learn whether it held. AgentError's classes: the lease thaws it then."""
        await self._stop_renewing()
        if self.begun is None:
            # The agent answers the requests of a connection in order: on this one, end would wait for begin.
            await self._disconnect()
        try:
            self.ended = await self._end()
        except AgentError:
            self._to_thaw = False  # it was tried; a cancelled try is made again on the way out
            raise
        self._to_thaw = False
        return self.ended

    async def _end(self) -> QuiesceEnded:
        clock = asyncio.get_running_loop().time
        deadline_s = clock() + END_PATIENCE_S
        while True:
            try:
                return await self._ask(lambda agent: agent.quiesce_end(self.id))
            except PeerGone as error:
                if clock() > deadline_s:
                    raise
                self._tell(f"{error.desc}; trying again to thaw")
                await asyncio.sleep(RETRY_S)

    async def leave_held(self) -> None:
        """Let it be: the lease thaws it, or somebody who knows the id."""
        self._to_thaw = False
        await self._stop_renewing()

    async def _renew(self) -> None:
        """Renew at each third of the lease, as long as ``max_hold_s`` allows."""
        clock, plan = asyncio.get_running_loop().time, self._plan
        until_s, pause_s = clock() + plan.max_hold_s, plan.lease_s / 3
        while True:
            await asyncio.sleep(pause_s)
            lease_s = min(plan.lease_s, until_s - clock())
            if lease_s < LEASE_LEAST_S:
                self._tell("held as long as it may be: the lease is not renewed any more")
                return
            lease_ms = round(1000 * lease_s)
            renew = partial(Agent.quiesce_renew, id_=self.id, lease_ms=lease_ms, timeout_s=plan.lease_s / 3)
            try:
                await self._ask(renew)
                pause_s = plan.lease_s / 3
            except PeerGone as error:
                self._tell(f"{error.desc}; the lease was not renewed, trying again")
                pause_s = min(RETRY_S, plan.lease_s / 3)
            except AgentError as error:
                self._tell(f"the lease cannot be renewed: {error.desc}")
                return

    async def _ask(self, ask: Callable[[Agent], Awaitable[T]]) -> T:
        """Ask on the connection that there is, or on a new one; forget it when it is lost."""
        try:
            return await ask(await self._ensure_connected())
        except PeerGone:
            await self._disconnect()
            raise

    async def _ensure_connected(self) -> Agent:
        if self._agent is None:
            self._agent = await self._connection.enter_async_context(self._connect())
        return self._agent

    async def _disconnect(self) -> None:
        self._agent = None
        await self._connection.aclose()

    async def _stop_renewing(self) -> None:
        if self._renewing is not None:
            self._renewing.cancel()
            await asyncio.wait({self._renewing})
            self._renewing = None
