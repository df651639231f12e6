"""Commands about memory: ours, and the QEMU guest agent's guest-*-memory-block*.

guest-*-memory-block* as in QEMU 10.0's qga/qapi-schema.json and qga/commands-linux.c.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ballast.guest.dispatch import command
from ballast.guest.memory.balloon import Balloon
from ballast.guest.memory.blocks import Blocks
from ballast.guest.memory.decisions import Decisions
from ballast.guest.memory.offline import TIMEOUT_S, Offline
from ballast.guest.memory.status import MemoryFacts
from ballast.wire.errors import BadRequest
from ballast.wire.memory_names import (
    BalloonDeflated,
    BalloonInflated,
    BalloonRanges,
    Decision,
    MemoryStatus,
    OfflineResult,
    OnlineResult,
    Zone,
)
from ballast.wire.shape import Uint64

_TIMEOUT_MAX_MS = 600_000


@dataclass(frozen=True, slots=True)
class GuestMemoryBlock:
    """QGA's: ``can-offline`` is sysfs' ``removable``; absent in a request."""

    phys_index: Uint64
    online: bool
    can_offline: bool | None = None


@dataclass(frozen=True, slots=True)
class GuestMemoryBlockResponse:
    """QGA's; ``error-code`` is an errno."""

    phys_index: int
    response: Literal["success", "not-found", "operation-not-supported", "operation-failed"]
    error_code: int | None = None


@dataclass(frozen=True, slots=True)
class GuestMemoryBlockInfo:
    """QGA's: the size of one block in bytes."""

    size: int


class MemoryCommands:
    """Thin: the facts come from ``memory.status``, the hands are ``memory.blocks``, ``.offline`` and ``.balloon``."""

    def __init__(
        self, facts: MemoryFacts, blocks: Blocks, offline: Offline, balloon: Balloon, decisions: Decisions
    ) -> None:
        self._facts = facts
        self._blocks = blocks
        self._offline = offline
        self._balloon = balloon
        self._decisions = decisions

    @command("ballast-memory-status", while_frozen=True)
    async def status(self) -> MemoryStatus:
        """All about memory in one reading. Since 0.1."""
        return self._facts.read()

    @command("ballast-memory-explain", while_frozen=True)
    async def explain(self) -> list[Decision]:
        """What changed memory lately, from which numbers and why; the newest last. Since 0.3."""
        return self._decisions.last()

    @command("ballast-memory-online", audited=True)
    async def online(
        self,
        *,
        bytes: int | None = None,
        blocks: list[int] | None = None,
        zone: Zone = "auto",
    ) -> OnlineResult:
        """Bring offline blocks online: ``bytes`` of them, or those in ``blocks``, or all.

        Never more than ``bytes``, and for that none that are leaving; auto picks the zone by the zone rule. Partial
        success is told block by block.
        Errors: bad-argument, not-supported. Since 0.1.
        """
        if bytes is not None and blocks is not None:
            raise BadRequest("Parameter 'bytes' and parameter 'blocks' exclude each other", argument="bytes")
        _check_size("bytes", bytes or 0)
        leaving = self._offline.leaving.indexes()
        return await self._blocks.online(bytes_=bytes, indexes=blocks, zone=zone, spared=leaving)

    @command("ballast-memory-offline", audited=True)
    async def offline(
        self,
        *,
        bytes: int | None = None,
        blocks: list[int] | None = None,
        dimm: int | None = None,
        timeout_ms: int = round(1000 * TIMEOUT_S),
    ) -> OfflineResult:
        """Take offline: DIMMs of no more than ``bytes``, or ``blocks`` of DIMMs, or the one at ``dimm``.

        A DIMM of which a block fails is online again as before. What is offline stays so for a minute, for the host to
        unplug it. Errors: bad-argument, not-supported, busy (other blocks are under way all the time). Since 0.2.
        """
        if [bytes, blocks, dimm].count(None) != 2:
            raise BadRequest("Exactly one of 'bytes', 'blocks' and 'dimm' is expected", argument="bytes")
        _check_size("bytes", bytes or 0)
        if not 1 <= timeout_ms <= _TIMEOUT_MAX_MS:
            raise BadRequest(f"Parameter 'timeout-ms' expects 1 to {_TIMEOUT_MAX_MS}", argument="timeout-ms")
        return await self._offline.take(bytes_=bytes, indexes=blocks, address=dimm, timeout_s=timeout_ms / 1000)

    @command("ballast-balloon-inflate", audited=True)
    async def balloon_inflate(self, *, target_bytes: int) -> BalloonInflated:
        """Take one chunk (64 MiB at most) towards the target, or return again the one that waits for its ack.

        Takes up to a minute. Errors: bad-argument, not-supported (no io_uring), kernel, deadline. Since 0.2.
        """
        _check_size("target-bytes", target_bytes)
        return await self._balloon.inflate(target_bytes)

    @command("ballast-balloon-ack", while_frozen=True)
    async def balloon_ack(self, *, chunk: int, punched_bytes: int) -> dict[str, str]:
        """Tell that the host has done with a chunk, of which it freed so much.

        Errors: bad-argument, no-such-id (it was given back), kernel, deadline. Since 0.2.
        """
        _check_size("punched-bytes", punched_bytes)
        await self._balloon.ack(chunk, punched_bytes)
        return {}

    @command("ballast-balloon-deflate", while_frozen=True, audited=True)
    async def balloon_deflate(self, *, target_bytes: int) -> BalloonDeflated:
        """Give memory back until no more than the target is held; it is usable at once.

        Errors: bad-argument, kernel, deadline. Since 0.2.
        """
        _check_size("target-bytes", target_bytes)
        return await self._balloon.deflate(target_bytes)

    @command("ballast-balloon-ranges", while_frozen=True)
    async def balloon_ranges(self) -> BalloonRanges:
        """All that the balloon holds, each frame looked up now. Errors: kernel (one has moved), deadline. Since 0.2."""
        return await self._balloon.ranges()

    @command("guest-get-memory-blocks")
    async def get_memory_blocks(self) -> list[GuestMemoryBlock]:
        """Every block of this guest. Since QGA 2.3."""
        return [GuestMemoryBlock(b.phys_index, b.is_online, b.is_removable) for b in self._blocks.read_all()]

    @command("guest-set-memory-blocks", audited=True)
    async def set_memory_blocks(self, *, mem_blks: list[GuestMemoryBlock]) -> list[GuestMemoryBlockResponse]:
        """Bring blocks online or offline one by one; one already in that state is a success. Since QGA 2.3."""
        responses = []
        for wanted in mem_blks:
            result, error_code = await self._blocks.set_state(wanted.phys_index, online=wanted.online)
            responses.append(GuestMemoryBlockResponse(wanted.phys_index, result, error_code))
        return responses

    @command("guest-get-memory-block-info")
    async def get_memory_block_info(self) -> GuestMemoryBlockInfo:
        """Size of a block. Since QGA 2.3."""
        return GuestMemoryBlockInfo(self._blocks.block_size_bytes())


def _check_size(argument: str, bytes_: int) -> None:
    if bytes_ < 0:
        raise BadRequest(f"Parameter '{argument}' expects 0 or more", argument=argument)
