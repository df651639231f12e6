"""Commands about the agent itself and about the conversation.

guest-sync, guest-ping and guest-info as in QEMU 10.0's qga/qapi-schema.json.
"""

from __future__ import annotations

import contextlib
import hmac
from collections.abc import Callable
from dataclasses import dataclass

from ballast.guest.dispatch import Table, command
from ballast.guest.events import NAMES, Events, Subscription
from ballast.guest.peer import Peer
from ballast.wire.errors import BadRequest, Unauthenticated
from ballast.wire.memory_names import DemandInterval, PsiTrigger
from ballast.wire.names import AgentStatus

_MAX_FAILED_TOKENS = 3
_DEMAND_MIN_MS, _DEMAND_MAX_MS = 100, 3_600_000


@dataclass(frozen=True, slots=True)
class GuestAgentCommandInfo:
    """QGA's: ``enabled`` is false for what policy or the freeze forbids."""

    name: str
    enabled: bool
    success_response: bool


@dataclass(frozen=True, slots=True)
class Sources:
    """What a subscription can switch on beside plain events; each returns what switches it off again.

    ``watch_pressure`` takes triggers, or None for the default ones; ``report_demand`` an interval in seconds.
    """

    watch_pressure: Callable[[list[PsiTrigger] | None, Subscription], Callable[[], None]]
    report_demand: Callable[[float, Subscription], Callable[[], None]]


class AgentCommands:
    """The handshake, the token, the subscriptions. ``token`` is None where none was provisioned."""

    def __init__(
        self,
        table: Table,
        events: Events,
        sources: Sources,
        *,
        version: str,
        token: bytes | None,
        read_status: Callable[[], AgentStatus],
    ) -> None:
        self._table = table
        self._events = events
        self._sources = sources
        self._version = version
        self._token = token
        self._read_status = read_status

    @command("guest-sync", while_frozen=True, unauthenticated=True)
    async def sync(self, *, id: int) -> int:
        """Return ``id``, so that a client can tell where its own answers begin. Since QGA 0.15."""
        return id

    @command("guest-sync-delimited", while_frozen=True, unauthenticated=True, delimited=True)
    async def sync_delimited(self, *, id: int) -> int:
        """Return ``id`` behind a byte 0xFF, which no JSON contains. Since QGA 1.1."""
        return id

    @command("guest-ping", while_frozen=True, unauthenticated=True)
    async def ping(self) -> dict[str, int]:
        """Answer with nothing. Since QGA 0.15."""
        return {}

    @command("guest-info", while_frozen=True, unauthenticated=True)
    async def info(self) -> dict[str, object]:
        """Version and all commands; its ``supported_commands`` has QGA's one underscore. Since QGA 0.15."""
        commands = [
            GuestAgentCommandInfo(n, self._table.is_allowed(n), success_response=True) for n in self._table.names
        ]
        return {"version": self._version, "supported_commands": commands}

    @command("ballast-agent-status", while_frozen=True, unauthenticated=True)
    async def status(self) -> AgentStatus:
        """What this agent is and can do. Since 0.1."""
        return self._read_status()

    @command("ballast-authenticate", while_frozen=True, unauthenticated=True)
    async def authenticate(self, peer: Peer, *, token: str) -> dict[str, int]:
        """Show the token that was provisioned to the guest; three wrong ones end the connection.

        Errors: unauthenticated. Since 0.1.
        """
        known = self._token is not None and hmac.compare_digest(token.encode(errors="replace"), self._token)
        if known:
            peer.authenticated = True
            return {}
        peer.failed_tokens += 1
        if peer.failed_tokens >= _MAX_FAILED_TOKENS:
            peer.close_after_reply()
        raise Unauthenticated("the token is wrong" if self._token is not None else "no token was provisioned")

    @command("ballast-subscribe", while_frozen=True)
    async def subscribe(
        self,
        peer: Peer,
        *,
        events: list[str] | None = None,
        psi: list[PsiTrigger] | None = None,
        demand: DemandInterval | None = None,
    ) -> dict[str, int]:
        """Send events on this connection from now on; a new subscription replaces the old.

        Arguments: ``events`` (all if absent), ``psi`` the triggers of BALLAST_PRESSURE (a default pair if absent),
        ``demand`` how often to send BALLAST_DEMAND (never if absent).
        Errors: bad-argument, not-supported, kernel. May run while frozen. Since 0.1.
        """
        unknown = sorted(set(events or ()) - set(NAMES))
        if unknown:
            raise BadRequest(
                f"Parameter 'events' names no event: {', '.join(unknown)}", argument="events", accepts=NAMES
            )
        if demand is not None and not _DEMAND_MIN_MS <= demand.interval_ms <= _DEMAND_MAX_MS:
            raise BadRequest(
                f"Parameter 'demand.interval-ms' expects {_DEMAND_MIN_MS} to {_DEMAND_MAX_MS}",
                argument="demand.interval-ms",
            )
        names = frozenset(NAMES if events is None else events)
        subscription = Subscription(names, peer.deliver)
        with contextlib.ExitStack() as fresh:
            if psi is not None or "BALLAST_PRESSURE" in names:
                fresh.callback(self._sources.watch_pressure(psi, subscription))
            if demand is not None:
                fresh.callback(self._sources.report_demand(demand.interval_ms / 1000, subscription))
            self._events.subscribe(subscription)
            fresh.callback(self._events.unsubscribe, subscription)
            peer.resources.close()
            peer.resources.push(fresh.pop_all())
        return {}
