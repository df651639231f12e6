"""Commands that freeze and thaw: our leases, and the QEMU guest agent's guest-fsfreeze-*.

guest-fsfreeze-* as in QEMU 10.0's qga/qapi-schema.json, with a lease that the configuration sets.
"""

from __future__ import annotations

from typing import Literal

from ballast.guest.dispatch import command
from ballast.guest.quiesce.session import Quiesce
from ballast.wire.names import QuiesceBegun, QuiesceEnded, QuiesceForecast, QuiesceRenewed, QuiesceStatus


class QuiesceCommands:
    """Thin: what a session is stands in ``quiesce.session``."""

    def __init__(self, quiesce: Quiesce) -> None:
        self._quiesce = quiesce

    @command("ballast-quiesce-begin", while_frozen=True, audited=True)
    async def begin(
        self,
        *,
        id: str,
        lease_ms: int,
        mountpoints: list[str] | None = None,
        exclude: list[str] | None = None,
        level: Literal["application", "filesystem"] = "application",
        on_failure: Literal["abort", "degrade"] = "abort",
    ) -> QuiesceBegun:
        """Freeze file systems and hold them until ``ballast-quiesce-end`` or the lease's end.

        Arguments: ``id`` a UUID of the client's, ``lease-ms`` 1,000 to 600,000, ``mountpoints`` (all if absent),
        ``exclude`` globs of mount points, ``level`` filesystem asks no writers, ``on-failure`` abort (thaw all and
        fail) or degrade (hold the rest). Errors: bad-argument, busy, kernel, deadline, lease-expired, writer-failed.
        May run while frozen: a repeat gives the same answer. Since 0.1.
        """
        return await self._quiesce.begin(
            id,
            lease_ms,
            mountpoints=mountpoints,
            exclude=exclude or (),
            degrade=on_failure == "degrade",
            with_writers=level == "application",
        )

    @command("ballast-quiesce-renew", while_frozen=True)
    async def renew(self, *, id: str, lease_ms: int) -> QuiesceRenewed:
        """Let the lease end ``lease-ms`` from now. Errors: no-such-id, lease-expired, deadline. Since 0.1."""
        return await self._quiesce.renew(id, lease_ms)

    @command("ballast-quiesce-end", while_frozen=True, audited=True)
    async def end(self, *, id: str) -> QuiesceEnded:
        """Thaw, and say whether it held. A repeat returns the stored answer. Errors: no-such-id. Since 0.1."""
        return await self._quiesce.end(id)

    @command("ballast-quiesce-status", while_frozen=True)
    async def status(self) -> QuiesceStatus:
        """What is frozen now, and for how long still. Since 0.1."""
        return self._quiesce.status()

    @command("ballast-quiesce-forecast")
    async def forecast(
        self, *, lease_ms: int | None = None, mountpoints: list[str] | None = None, exclude: list[str] | None = None
    ) -> QuiesceForecast:
        """What a freeze would cover, in which order, and what may go wrong in it. Changes nothing.

        Arguments: as those of ``ballast-quiesce-begin``; ``lease-ms`` is the configured one if absent.
        What does not answer within 10 s is a risk. Errors: bad-argument. Since 0.1.
        """
        return await self._quiesce.outlook.forecast(lease_ms, mountpoints=mountpoints, exclude=exclude or ())

    @command("guest-fsfreeze-status", while_frozen=True)
    async def fsfreeze_status(self) -> str:
        """Return "frozen" or "thawed"; what is on its way to either is "frozen". Since QGA 0.15."""
        return "frozen" if self._quiesce.is_frozen else "thawed"

    @command("guest-fsfreeze-freeze", audited=True)
    async def fsfreeze_freeze(self) -> int:
        """Freeze all; returns how many. Fails whole if anything freezable failed. Since QGA 0.15."""
        return await self._quiesce.qga_freeze(None)

    @command("guest-fsfreeze-freeze-list", audited=True)
    async def fsfreeze_freeze_list(self, *, mountpoints: list[str] | None = None) -> int:
        """Freeze those at ``mountpoints``, of which unknown ones are ignored; returns how many. Since QGA 2.2."""
        return await self._quiesce.qga_freeze(mountpoints)

    @command("guest-fsfreeze-thaw", while_frozen=True, audited=True)
    async def fsfreeze_thaw(self) -> int:
        """Thaw; returns how many. The first one after the lease did it is an error that says so. Since QGA 0.15."""
        return await self._quiesce.qga_thaw()
