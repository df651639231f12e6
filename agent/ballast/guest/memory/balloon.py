"""The balloon: memory of the guest's that the host may use elsewhere, taken and given back chunk by chunk.

The pages are the holder's, a process of its own that the kernel kills before any other. What is decided here: how much
may be taken (``floor``), which chunk the host has not acknowledged yet, and when to give way. The balloon never grows
by itself. A chunk that waits for its ack is pinned by the holder's ring and by our copy of it, so that neither's
death frees what the host is about to punch.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from typing import Any

from ballast.guest.events import Events
from ballast.guest.linux.tree import Tree
from ballast.guest.memory import holder_protocol as protocol
from ballast.guest.memory.decisions import Decisions
from ballast.guest.memory.floor import Readings, read_now, room_bytes
from ballast.guest.memory.holder_client import HeldChunk, HolderConnection, HolderLost, is_holder_running, merged
from ballast.guest.memory.holder_protocol import CHUNK_BYTES, GRAIN_BYTES
from ballast.guest.memory.kernel_balloon import BalloonMode, refusal
from ballast.wire.errors import AgentError, KernelFailure, NoSuchId, NotSupported
from ballast.wire.memory_names import (
    BalloonDeflated,
    BalloonInflated,
    BalloonRanges,
    BalloonState,
    ChangeReason,
    Ranges,
)

log = logging.getLogger(__name__)

START_S = 30.0
TAKE_S = 60.0  # compaction can take long
GIVE_S = 30.0
# After it gave way a host's loop may still be asking for more: what was asked for before is not given.
HOLD_OFF_S = 10.0
_MOVED = "pages of the balloon have moved although they are pinned"


class Balloon:
    """One at a time of inflate, ack, deflate and ranges; all may run while frozen but ``inflate``."""

    def __init__(
        self,
        tree: Tree,
        events: Events,
        decisions: Decisions | None = None,
        *,
        boot_id: str,
        path: str = protocol.SOCKET_PATH,
        mode: BalloonMode = "auto",
    ) -> None:
        self.target_bytes = 0
        self._mode: BalloonMode = mode
        self._tree = tree
        self._events = events
        self._decisions = decisions or Decisions()
        self._boot_id = boot_id
        self._path = path
        self._lock = asyncio.Lock()
        self._holder: HolderConnection | None = None
        self._unreached_bytes = 0  # what a holder that does not answer had when it last did
        self._held: HeldChunk | None = None
        self._has_moved = False
        self._looked_at = 0  # the chunk that was looked at last
        self._gave_way_at_s = float("-inf")

    @property
    def bytes(self) -> int:
        """What it holds now."""
        if self._holder is not None:
            return self._holder.total_bytes
        return self._unreached_bytes or (self._held.bytes if self._held else 0)

    def state(self) -> BalloonState:
        """What it holds, and was last told to hold."""
        return BalloonState(self.bytes, self.target_bytes, fault="moved" if self._has_moved else None)

    async def recover(self) -> None:
        """Find an earlier agent's balloon again. Never raises."""
        try:
            if is_holder_running(self._tree):
                await self._reach()
        except AgentError as error:
            log.warning("cannot take over the balloon: %s", error.desc)
        self.target_bytes = self.bytes

    async def inflate(self, target_bytes: int) -> BalloonInflated:
        """Take a chunk towards the target, or return the one that still waits for its ack.

        NotSupported without io_uring, where frames are hidden, and beside another balloon that is in use;
        KernelFailure, DeadlineExceeded. Blocks for up to TAKE_S.
        """
        async with self._lock:
            if self._held is not None:
                await self._verify(self._held.id - 1)  # it was told a while ago
            if self._held is None:
                self.target_bytes = target_bytes
                await self._take(target_bytes - self.bytes)
            is_done = self.bytes + GRAIN_BYTES > target_bytes
            return BalloonInflated(
                chunk=self._held.id if self._held else None,
                bytes=self._held.bytes if self._held else 0,
                total_bytes=self.bytes,
                ranges=merged(self._held.ranges) if self._held else [],
                done=is_done,
                floor=not is_done and self._room_bytes(self.look()) < GRAIN_BYTES,
            )

    async def ack(self, chunk: int, punched_bytes: int) -> None:
        """Let the chunk be one of many: the host has done with it. NoSuchId if it no longer waits for that."""
        async with self._lock:
            held = self._held
            if held is None or held.id != chunk:
                raise NoSuchId(f"chunk {chunk} waits for no ack: it was given back, or was acknowledged")
            await self._ask({"op": "ack", "chunk": chunk})
            log.info("balloon chunk %d: the host has freed %d of %d bytes", chunk, punched_bytes, held.bytes)
            if self._holder is None:
                await self._release_held("holder-lost")
            else:
                held.let_go()
                self._held = None

    async def deflate(self, target_bytes: int) -> BalloonDeflated:
        """Give back until no more than the target is held, newest first; the chunk without an ack last of all.

        KernelFailure, DeadlineExceeded. What is given back is usable on return.
        """
        return await self._deflate(lambda: target_bytes, "deflate")

    async def give_way(self, bytes_: int) -> BalloonDeflated:
        """Give back that much, as far as the host has acknowledged it, and take no more until told again."""
        return await self._deflate(lambda: max(0, self.bytes - bytes_), "pressure")

    async def give_back_before_sleep(self) -> BalloonDeflated:
        """Give all of it back, since a hibernation's image has no holes, and take no more until told again."""
        return await self._deflate(lambda: 0, "suspend")

    async def look_again(self) -> None:
        """Look up the frames of one chunk, the next each time. KernelFailure if one has moved, DeadlineExceeded."""
        async with self._lock:
            if not self._has_moved:
                chunk = await self._verify(self._looked_at) or await self._verify(0)
                self._looked_at = chunk[0] if chunk else 0

    async def _deflate(self, target: Callable[[], int], cause: str) -> BalloonDeflated:
        if cause != "deflate":
            self._gave_way_at_s = time.monotonic()
        if self._holder is not None:
            self._holder.hurry()
        async with self._lock:
            before_bytes, target_bytes = self.bytes, target()
            ranges = await self._release_acked(target_bytes)
            if self._held is not None and self.bytes > target_bytes and cause != "pressure":
                ranges = ranges + self._held.ranges
                await self._release_held(cause)
            self.target_bytes = min(target_bytes, self.bytes) if cause != "pressure" else self.bytes
            if given_bytes := before_bytes - self.bytes:
                self._tell(cause)
            if given_bytes and cause != "pressure":  # who has it give way knows why
                reason: ChangeReason = "suspend" if cause == "suspend" else "asked"
                self._decisions.note("deflated", reason, given_bytes, target_bytes=target_bytes)
            if self._holder is not None and not self._holder.total_bytes:
                self._holder.close()
                self._holder = None
            return BalloonDeflated(given_bytes, self.bytes, merged(ranges))

    async def ranges(self) -> BalloonRanges:
        """All that is held, each frame looked up in pagemap now. KernelFailure if one has moved: no more is taken."""
        async with self._lock:
            ranges: Ranges = []
            after = 0
            while chunk := await self._verify(after):
                after, _bytes, chunk_ranges, _fd = chunk
                ranges = ranges + chunk_ranges
            if self._holder is None and self._held is not None:
                ranges = self._held.ranges
            generation = self._holder.generation if self._holder is not None else 0
            return BalloonRanges(self._boot_id, generation, self.bytes, merged(ranges))

    async def close(self) -> None:
        """Before the agent leaves: give back the chunk that after it nobody would hold, since the holder is gone."""
        async with self._lock:
            if self._held is not None and not is_holder_running(self._tree):
                with contextlib.suppress(AgentError):  # that its holder is gone we know, heard of or not
                    await self._release_held("holder-lost")

    # With the lock held.

    async def _take(self, wanted_bytes: int) -> None:
        """Take what is wanted, as far as it can be spared; nothing at a floor."""
        if self._has_moved:
            raise KernelFailure(_MOVED, operation="pin")
        if wanted_bytes >= GRAIN_BYTES and (reason := refusal(self._tree, self._mode)):
            self._decisions.note("not-inflated", "configured", wanted_bytes, target_bytes=self.target_bytes)
            raise NotSupported(reason)
        now, wanted_bytes = self.look(), min(wanted_bytes, CHUNK_BYTES)
        bytes_ = min(wanted_bytes, self._room_bytes(now)) // GRAIN_BYTES * GRAIN_BYTES
        numbers = now.numbers() | {"target_bytes": self.target_bytes}
        if bytes_ <= 0:
            if wanted_bytes >= GRAIN_BYTES:
                is_held_off = numbers["room_bytes"] >= GRAIN_BYTES
                self._decisions.note("not-inflated", "pressure" if is_held_off else "floor", wanted_bytes, **numbers)
            return
        holder = self._holder or await self._connect()
        if self._held is None:
            self._held = await holder.take(bytes_, timeout_s=TAKE_S)
        self._tell("inflate")
        self._decisions.note("inflated", "asked", self._held.bytes, **numbers)

    async def _verify(self, after: int) -> list[Any] | None:
        """The first chunk after that id, its frames looked up now; None if there is none. KernelFailure if one moved.

        Then the chunk without an ack is given back, as its frames may be another's; what is punched harms nobody.
        """
        answer = await self._ask({"op": "ranges", "after": after})
        if answer is None or not answer["moved"]:
            return answer["chunk"] if answer else None
        if not self._has_moved:
            self._has_moved = True
            log.error("%s: it takes no more, and the host is told", _MOVED)
            self._tell("moved")
            if self._held is not None:
                await self._release_held("moved")
        raise KernelFailure(_MOVED, operation="pin")

    async def _reach(self) -> HolderConnection | None:
        """The connection to a running holder; None if none runs."""
        if self._holder is None and is_holder_running(self._tree):
            return await self._connect()
        self._unreached_bytes = 0
        return self._holder

    async def _connect(self) -> HolderConnection:
        self._holder, held = await HolderConnection.open(self._path, self._lost, timeout_s=START_S)
        self._unreached_bytes = 0
        if held is not None:
            if self._held is not None:
                self._held.let_go()
            self._held = held
        return self._holder

    async def _ask(self, message: dict[str, Any]) -> dict[str, Any] | None:
        """Ask a running holder; None if there is none, or none any more: then all is given back but the held chunk."""
        try:
            holder = await self._reach()
            return await holder.ask(message, timeout_s=GIVE_S) if holder else None
        except HolderLost:
            return None

    async def _release_acked(self, target_bytes: int) -> Ranges:
        ranges: Ranges = []
        while (over_bytes := self.bytes - target_bytes) > 0:
            answer = await self._ask({"op": "release", "of": "acked", "bytes": over_bytes})
            if answer is None or not answer["bytes"]:
                break
            ranges = ranges + answer["ranges"]
        return ranges

    async def _release_held(self, cause: str) -> None:
        """Give the chunk without an ack back; whoever may be about to punch it is told first."""
        held = self._held
        assert held is not None
        left_bytes = self.bytes - held.bytes
        about = {"chunk": held.id, "ranges": merged(held.ranges)}
        self._events.publish("BALLAST_BALLOON", {"cause": cause, "total-bytes": left_bytes} | about)
        self._held = None
        try:
            await self._ask({"op": "release", "of": held.id, "bytes": held.bytes})
        finally:
            held.release()
        self.target_bytes = min(self.target_bytes, left_bytes)

    def _lost(self, is_gone: bool) -> None:
        """The holder is gone, and so is all that it held alone; or it only does not answer."""
        assert self._holder is not None
        before_bytes = self._holder.total_bytes
        self._holder = None
        self._unreached_bytes = 0 if is_gone else before_bytes
        if is_gone and before_bytes:
            self._gave_way_at_s = time.monotonic()
            self.target_bytes = self.bytes
            self._decisions.note("holder-lost", "killed", before_bytes - self.bytes, balloon_bytes=before_bytes)
            self._tell("holder-lost")

    def _tell(self, cause: str) -> None:
        self._events.publish("BALLAST_BALLOON", {"cause": cause, "total-bytes": self.bytes})

    def look(self) -> Readings:
        """What decides how much can be taken or must be given back, read now."""
        return read_now(self._tree, self.bytes)

    def _room_bytes(self, now: Readings) -> int:
        return 0 if time.monotonic() < self._gave_way_at_s + HOLD_OFF_S else room_bytes(now)
