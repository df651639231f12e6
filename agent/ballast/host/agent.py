"""A typed client of the agent: a method for each command, the records of ``wire.names`` out.

Unknown fields are ignored. What the agent refuses raises the class of ``wire.errors`` that its reason names; what it
answers in a form that we do not know raises NotUnderstood.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypeVar

from ballast.host.connection import Connection, NotUnderstood
from ballast.host.qga import GuestInfo, MemoryBlock, MemoryBlockInfo, MemoryBlockResult
from ballast.wire.errors import BadRequest
from ballast.wire.memory_names import (
    BalloonDeflated,
    BalloonInflated,
    BalloonRanges,
    Decision,
    DemandInterval,
    MemoryStatus,
    OfflineResult,
    OnlineResult,
    PsiTrigger,
    Zone,
)
from ballast.wire.names import AgentStatus, QuiesceBegun, QuiesceEnded, QuiesceForecast, QuiesceRenewed, QuiesceStatus
from ballast.wire.shape import read_value, to_wire, wire_name

T = TypeVar("T")

# The agent syncs before it freezes, and a sync takes as long as the guest's disks do.
FREEZE_TIMEOUT_S = 300.0
THAW_TIMEOUT_S = 60.0
# The guest gives up after ten seconds.
FORECAST_TIMEOUT_S = 30.0
ONLINE_TIMEOUT_S = 60.0
# In the guest; and how much longer its answer may take, since what it gives up it first brings online again.
OFFLINE_TIMEOUT_MS = 30_000
OFFLINE_GRACE_S = 60.0
# Compaction may have to find the pages; the guest gives up after a minute.
INFLATE_TIMEOUT_S = 120.0
DEFLATE_TIMEOUT_S = 60.0

QuiesceLevel = Literal["application", "filesystem"]
OnFailure = Literal["abort", "degrade"]


class Agent(Connection):
    """The commands of an agent; ``async with Agent.connect(target) as agent``."""

    async def _ask(self, kind: type[T], command: str, *, timeout_s: float | None = None, **arguments: Any) -> T:
        """Run ``command`` with those arguments that are not None, and read what it returns as ``kind``."""
        given = {wire_name(name): value for name, value in arguments.items() if value is not None}
        return self._understand(kind, await self.call(command, to_wire(given), timeout_s=timeout_s), command)

    def _understand(self, kind: type[T], value: Any, command: str) -> T:
        try:
            read: T = read_value(kind, value, command, strict=False)
        except BadRequest as error:
            raise NotUnderstood(f"{self.target}: cannot read the answer to {command}: {error.desc}") from error
        return read

    # --- the QEMU guest agent's commands

    async def guest_ping(self, timeout_s: float | None = None) -> None:
        """Return when the agent answers."""
        await self.call("guest-ping", timeout_s=timeout_s)

    async def guest_info(self) -> GuestInfo:
        """Version and commands."""
        value = await self.call("guest-info")
        # The one name on this wire that has an underscore.
        if isinstance(value, dict) and "supported_commands" in value:
            value = value | {"supported-commands": value["supported_commands"]}
        return self._understand(GuestInfo, value, "guest-info")

    async def guest_get_memory_blocks(self) -> list[MemoryBlock]:
        """All memory blocks."""
        return await self._ask(list[MemoryBlock], "guest-get-memory-blocks")

    async def guest_set_memory_blocks(self, blocks: Sequence[MemoryBlock]) -> list[MemoryBlockResult]:
        """Online or offline blocks; one result each."""
        wanted = [{"phys-index": block.phys_index, "online": block.online} for block in blocks]
        return await self._ask(list[MemoryBlockResult], "guest-set-memory-blocks", mem_blks=wanted)

    async def guest_get_memory_block_info(self) -> MemoryBlockInfo:
        """Give the size of a memory block."""
        return await self._ask(MemoryBlockInfo, "guest-get-memory-block-info")

    async def guest_fsfreeze_status(self) -> str:
        """``thawed`` or ``frozen``."""
        return await self._ask(str, "guest-fsfreeze-status")

    async def guest_fsfreeze_freeze(self, timeout_s: float = FREEZE_TIMEOUT_S) -> int:
        """Freeze all file systems under the agent's own lease; returns how many."""
        return await self._ask(int, "guest-fsfreeze-freeze", timeout_s=timeout_s)

    async def guest_fsfreeze_freeze_list(
        self, mountpoints: Sequence[str] | None = None, timeout_s: float = FREEZE_TIMEOUT_S
    ) -> int:
        """Freeze the file systems of these mount points, or all; returns how many."""
        return await self._ask(int, "guest-fsfreeze-freeze-list", timeout_s=timeout_s, mountpoints=mountpoints)

    async def guest_fsfreeze_thaw(self, timeout_s: float = THAW_TIMEOUT_S) -> int:
        """Thaw; returns how many. LeaseExpired the first time after the lease has thawed by itself."""
        return await self._ask(int, "guest-fsfreeze-thaw", timeout_s=timeout_s)

    # --- the agent and its events

    async def status(self) -> AgentStatus:
        """Version, features, limits and health of the agent; needs no token."""
        return await self._ask(AgentStatus, "ballast-agent-status")

    async def subscribe(
        self,
        events: Sequence[str] | None = None,
        psi: Sequence[PsiTrigger] | None = None,
        demand: DemandInterval | None = None,
    ) -> None:
        """Ask for events, all or those named, in place of what this connection asked for before."""
        await self._ask(dict[str, Any], "ballast-subscribe", events=events, psi=psi, demand=demand)

    # --- memory

    async def memory_status(self) -> MemoryStatus:
        """What the guest has, uses and wants."""
        return await self._ask(MemoryStatus, "ballast-memory-status")

    async def memory_explain(self) -> list[Decision]:
        """What changed memory lately, from which numbers and why; the newest last."""
        return await self._ask(list[Decision], "ballast-memory-explain")

    async def memory_online(
        self,
        bytes_: int | None = None,
        blocks: Sequence[int] | None = None,
        zone: Zone | None = None,
        timeout_s: float = ONLINE_TIMEOUT_S,
    ) -> OnlineResult:
        """Bring memory online: that many bytes, these blocks, or with neither all there is."""
        return await self._ask(
            OnlineResult, "ballast-memory-online", timeout_s=timeout_s, bytes_=bytes_, blocks=blocks, zone=zone
        )

    async def memory_offline(
        self,
        bytes_: int | None = None,
        blocks: Sequence[int] | None = None,
        dimm: int | None = None,
        timeout_ms: int | None = None,
    ) -> OfflineResult:
        """Take memory offline: DIMMs of no more than so many bytes, these blocks, or the DIMM at this address."""
        timeout_ms = OFFLINE_TIMEOUT_MS if timeout_ms is None else timeout_ms
        timeout_s = timeout_ms / 1000 + OFFLINE_GRACE_S
        asked = {"bytes_": bytes_, "blocks": blocks, "dimm": dimm, "timeout_ms": timeout_ms}
        return await self._ask(OfflineResult, "ballast-memory-offline", timeout_s=timeout_s, **asked)

    async def balloon_inflate(self, target_bytes: int, timeout_s: float = INFLATE_TIMEOUT_S) -> BalloonInflated:
        """Take one chunk towards the target, or name again the one that waits for its ack."""
        command = "ballast-balloon-inflate"
        return await self._ask(BalloonInflated, command, timeout_s=timeout_s, target_bytes=target_bytes)

    async def balloon_ack(self, chunk: int, punched_bytes: int, timeout_s: float = DEFLATE_TIMEOUT_S) -> None:
        """Tell that the host has done with a chunk. NoSuchId if the guest has taken it back."""
        await self._ask(
            dict[str, Any], "ballast-balloon-ack", timeout_s=timeout_s, chunk=chunk, punched_bytes=punched_bytes
        )

    async def balloon_deflate(self, target_bytes: int, timeout_s: float = DEFLATE_TIMEOUT_S) -> BalloonDeflated:
        """Give memory back to the guest until its balloon holds no more than the target."""
        command = "ballast-balloon-deflate"
        return await self._ask(BalloonDeflated, command, timeout_s=timeout_s, target_bytes=target_bytes)

    async def balloon_ranges(self, timeout_s: float = DEFLATE_TIMEOUT_S) -> BalloonRanges:
        """All that the balloon holds, each frame looked up by the guest's kernel now."""
        return await self._ask(BalloonRanges, "ballast-balloon-ranges", timeout_s=timeout_s)

    # --- quiesce

    async def quiesce_begin(
        self,
        id_: str,
        lease_ms: int,
        *,
        mountpoints: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
        level: QuiesceLevel | None = None,
        on_failure: OnFailure | None = None,
        timeout_s: float = FREEZE_TIMEOUT_S,
    ) -> QuiesceBegun:
        """Freeze file systems for ``lease_ms`` (1,000 to 600,000); a repeat of ``id_`` gets the same answer.

        After NoAnswer or PeerGone the freeze may still come about: end it with ``quiesce_end`` on a new connection.
        """
        return await self._ask(
            QuiesceBegun,
            "ballast-quiesce-begin",
            timeout_s=timeout_s,
            id_=id_,
            lease_ms=lease_ms,
            mountpoints=mountpoints,
            exclude=exclude,
            level=level,
            on_failure=on_failure,
        )

    async def quiesce_renew(self, id_: str, lease_ms: int, timeout_s: float | None = None) -> QuiesceRenewed:
        """Let the lease run for ``lease_ms`` from now."""
        return await self._ask(QuiesceRenewed, "ballast-quiesce-renew", timeout_s=timeout_s, id_=id_, lease_ms=lease_ms)

    async def quiesce_end(self, id_: str, timeout_s: float = THAW_TIMEOUT_S) -> QuiesceEnded:
        """Thaw, and learn whether it held; a repeat of ``id_`` gets the same answer."""
        return await self._ask(QuiesceEnded, "ballast-quiesce-end", timeout_s=timeout_s, id_=id_)

    async def quiesce_forecast(
        self,
        lease_ms: int | None = None,
        mountpoints: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
        timeout_s: float = FORECAST_TIMEOUT_S,
    ) -> QuiesceForecast:
        """What a freeze would cover, in which order, and what may go wrong in it."""
        return await self._ask(
            QuiesceForecast,
            "ballast-quiesce-forecast",
            timeout_s=timeout_s,
            lease_ms=lease_ms,
            mountpoints=mountpoints,
            exclude=exclude,
        )

    async def quiesce_status(self) -> QuiesceStatus:
        """Tell whether something is frozen, by whom and for how long."""
        return await self._ask(QuiesceStatus, "ballast-quiesce-status")
