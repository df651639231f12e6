"""What a peer asked to freeze, checked; and a forecast of it."""

from __future__ import annotations

from collections.abc import Collection

from ballast.guest.config import Quiesce as Settings
from ballast.guest.linux.tree import Tree
from ballast.guest.linux.writeback import read_dirty_bytes
from ballast.guest.quiesce import guard_protocol
from ballast.guest.quiesce.culprits import ask_others
from ballast.guest.quiesce.forecast import Plan, plan_freeze
from ballast.guest.quiesce.graph import Graph
from ballast.guest.quiesce.risks import READERS, Freeze, find_risks
from ballast.guest.quiesce.witnesses import Starter, Witnesses
from ballast.guest.units import start_unit
from ballast.wire.errors import AgentError, BadRequest, NotSupported
from ballast.wire.names import QuiesceForecast, Risk, Skipped

LEASE_MIN_MS, LEASE_MAX_MS = 1_000, 600_000
FORECAST_TIMEOUT_S = 10.0  # a host waits longer


class Outlook:
    """Looks; changes nothing."""

    def __init__(self, tree: Tree, settings: Settings, start: Starter = start_unit) -> None:
        self._tree = tree
        self._settings = settings
        self._looks = READERS | ask_others(Witnesses(start))

    def plan(self, mountpoints: Collection[str] | None, exclude: Collection[str], *, strict: bool = True) -> Plan:
        """What to freeze, and in which order. BadRequest for a mount point that is none, unless not ``strict``.

        NotSupported if there are too many, AgentError if the table of mounts cannot be read.
        """
        try:
            plan = plan_freeze(self._tree, only=mountpoints, exclude=exclude)
        except (OSError, ValueError) as error:
            raise AgentError(f"cannot read the table of mounts: {error}") from error
        if len(plan.filesystems) > guard_protocol.MAX_FILESYSTEMS:
            raise NotSupported(f"more than {guard_protocol.MAX_FILESYSTEMS} file systems")
        known = {point for f in plan.filesystems for point in f.mountpoints}
        known |= {point for s in plan.skipped for point in s.filesystem.mountpoints}
        unknown = sorted(set(mountpoints or ()) - known)
        if strict and unknown:
            raise BadRequest(
                f"Parameter 'mountpoints' names no mount point: {', '.join(unknown)}", argument="mountpoints"
            )
        return plan

    async def forecast(
        self, lease_ms: int | None = None, *, mountpoints: Collection[str] | None = None, exclude: Collection[str] = ()
    ) -> QuiesceForecast:
        """What a freeze would cover, and what may go wrong in it. As ``plan``; what does not answer is a risk."""
        lease_ms = self._settings.lease_ms if lease_ms is None else lease_ms
        check_lease(lease_ms)
        plan = self.plan(mountpoints, exclude)
        try:
            dirty_bytes = read_dirty_bytes(self._tree)
        except OSError as error:
            raise AgentError(f"cannot read how much is to be written: {error}") from error
        return QuiesceForecast(
            [[filesystem.mountpoint for filesystem in level] for level in plan.levels],
            [Skipped(one.filesystem.mountpoint, one.reason) for one in plan.skipped],
            await self.risks(plan, lease_ms / 1000, timeout_s=FORECAST_TIMEOUT_S),
            dirty_bytes,
        )

    def dirty_bytes(self) -> int | None:
        """What waits to be written at this moment; None where it cannot be read."""
        try:
            return read_dirty_bytes(self._tree)
        except OSError:
            return None

    async def risks(self, plan: Plan, lease_s: float, *, timeout_s: float, max_age_s: float = 0.0) -> list[Risk]:
        """What may go wrong in a freeze by ``plan``, known after ``timeout_s`` at the latest. Not while frozen.

        What others have told within ``max_age_s`` is not asked again. AgentError if the table of mounts cannot be read.
        """
        try:
            freeze = Freeze(self._tree, Graph(self._tree), plan, lease_s, max_age_s)
        except (OSError, ValueError) as error:
            raise AgentError(f"cannot read the table of mounts: {error}") from error
        return await find_risks(freeze, self._looks, timeout_s=timeout_s) if plan.levels else []


def check_lease(lease_ms: int) -> None:
    """BadRequest for a lease that is too short or too long."""
    if not LEASE_MIN_MS <= lease_ms <= LEASE_MAX_MS:
        raise BadRequest(f"Parameter 'lease-ms' expects {LEASE_MIN_MS} to {LEASE_MAX_MS}", argument="lease-ms")
