"""Takes DIMMs offline, so that the host can unplug them: whole, or not at all.

No page is given away and none is touched: the kernel moves what is in use elsewhere, and the host then takes the
empty DIMM. If one block of a DIMM cannot be emptied, those before it come online again in the zone they were in, and
for a while other DIMMs are chosen first. So is, of two, the one that has less to be moved; and if there is no place for
that, cold page cache makes room before.
"""

from __future__ import annotations

import asyncio
import errno
import time
from collections.abc import Iterable, Sequence

from ballast.guest.linux.kpageflags import count_free_bytes
from ballast.guest.linux.meminfo import Meminfo, parse_meminfo
from ballast.guest.linux.tree import Tree
from ballast.guest.memory.backoff import Backoff
from ballast.guest.memory.blocks import MEMORY, Blocks
from ballast.guest.memory.decisions import Decisions
from ballast.guest.memory.dimms import Dimm, read_dimms
from ballast.guest.memory.floor import floor_bytes
from ballast.guest.memory.leaving import Leaving
from ballast.guest.memory.offline_child import take_offline
from ballast.guest.memory.trim import TRIM_S, trim
from ballast.guest.threads import in_thread
from ballast.wire.errors import BadRequest, Busy
from ballast.wire.memory_names import BlockResult, ChangeReason, DimmResult, OfflineResult, Zone

TIMEOUT_S = 30.0
FAILED_FIRST_S, FAILED_MOST_S = 50.0, 300.0  # as virtio-mem does it
_SLACK_BYTES = 32 << 20  # what the kernel keeps for itself while it moves pages
_REASONS = {errno.ETIMEDOUT: "deadline", errno.ECHILD: "killed"}
_GROUNDS: dict[str | None, ChangeReason] = {"no-room": "no-room", "deadline": "deadline", "killed": "killed"}


class Offline:
    """One request at a time, and none while blocks are being brought online."""

    def __init__(self, tree: Tree, blocks: Blocks, leaving: Leaving, decisions: Decisions | None = None) -> None:
        self._tree = tree
        self._blocks = blocks
        self._leaving = leaving
        self._decisions = decisions or Decisions()
        self._failed = Backoff(FAILED_FIRST_S, FAILED_MOST_S)

    @property
    def leaving(self) -> Leaving:
        """The blocks that were taken offline and wait for the host."""
        return self._leaving

    async def take(
        self,
        *,
        bytes_: int | None = None,
        indexes: Sequence[int] | None = None,
        address: int | None = None,
        timeout_s: float = TIMEOUT_S,
    ) -> OfflineResult:
        """Take blocks offline: whole DIMMs of no more than ``bytes_``, or these blocks, or the DIMM at ``address``.

        Partial success is told DIMM by DIMM. BadRequest for what is no DIMM or part of one; Busy if blocks are still
        being brought online or offline when the time is over.
        """
        deadline_s = time.monotonic() + timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                await self._blocks.changing.acquire()
        except TimeoutError as error:
            raise Busy("other memory blocks are being brought online or offline") from error
        try:
            chosen = await self._choose(bytes_, indexes, address)
            before = self._read_memory()
            results = [one for wanted in chosen.values() for one in await self._take_dimm(wanted, deadline_s)]
        finally:
            self._blocks.changing.release()
        self._note(results, before)
        done = sum(1 for one in results if one.result == "done")
        return OfflineResult(done * self._size_bytes(), results, [self._result_of(dimm) for dimm in chosen])

    async def _choose(
        self, bytes_: int | None, indexes: Sequence[int] | None, address: int | None
    ) -> dict[Dimm, list[int]]:
        """The DIMMs to deal with, and which blocks of each."""
        dimms = read_dimms(self._tree, self._blocks)
        if indexes is not None:
            unknown = sorted(set(indexes) - {index for dimm in dimms for index in dimm.indexes})
            if unknown:
                raise BadRequest(f"Parameter 'blocks' names no block of a DIMM: {unknown}", argument="blocks")
            wanted = {dimm: [index for index in dimm.indexes if index in indexes] for dimm in dimms}
            return {dimm: blocks for dimm, blocks in wanted.items() if blocks}
        if address is not None:
            chosen = [dimm for dimm in dimms if dimm.address == address]
            if not chosen:
                raise BadRequest(f"Parameter 'dimm' is the first address of no DIMM: {address:#x}", argument="dimm")
        else:
            fitting = [dimm for dimm in dimms if len(dimm.indexes) * self._size_bytes() <= (bytes_ or 0)]
            used_bytes = await in_thread(lambda: self._read_used(fitting), name="memory-used")
            chosen = self._fit(fitting, bytes_ or 0, used_bytes)
        return {dimm: list(dimm.indexes) for dimm in chosen}

    def _read_used(self, dimms: Sequence[Dimm]) -> dict[Dimm, int]:
        """What is in use of each DIMM that is online; nothing where there is no choice, or the kernel does not tell."""
        online = {dimm: [index for index in dimm.indexes if self._is_online(index)] for dimm in dimms}
        if sum(1 for indexes in online.values() if indexes) < 2:
            return {}
        try:
            return {
                dimm: len(indexes) * self._size_bytes() - self._free_bytes(indexes) for dimm, indexes in online.items()
            }
        except OSError:
            return {}

    def _free_bytes(self, indexes: Iterable[int]) -> int:
        size_bytes = self._size_bytes()
        return sum(count_free_bytes(self._tree, index * size_bytes, size_bytes) for index in indexes)

    def _fit(self, dimms: list[Dimm], bytes_: int, used_bytes: dict[Dimm, int]) -> list[Dimm]:
        """Those that are offline already, so that a repeated request takes no more; then those that are emptied best.

        Those last of which a block failed lately; movable ones, with little in use, from the top.
        """

        def reluctance(dimm: Dimm) -> tuple[bool, bool, bool, int, int]:
            online = [index for index in dimm.indexes if self._is_online(index)]
            failed = any(index in self._failed for index in online)
            kernel = any(self._blocks.zone(index) != "movable" for index in online)
            return bool(online), failed, kernel, used_bytes.get(dimm, 0), -dimm.address

        chosen = []
        for dimm in sorted(dimms, key=reluctance):
            dimm_bytes = len(dimm.indexes) * self._size_bytes()
            if dimm_bytes <= bytes_:
                chosen.append(dimm)
                bytes_ -= dimm_bytes
        return chosen

    async def _take_dimm(self, wanted: list[int], deadline_s: float) -> list[BlockResult]:
        """Deal with those blocks of one DIMM, from the top: all of them offline, or all as before."""
        zones = {index: self._blocks.zone(index) for index in reversed(wanted) if self._is_online(index)}
        left = [index for index in wanted if index not in zones and index in self._leaving]
        reason, back = "", dict[int, BlockResult]()
        self._leaving.begin(zones)
        try:
            reason = await self._offline(zones, deadline_s)
        finally:
            still_online = [index for index in zones if self._is_online(index)]
            if still_online:
                undo = {index: zone for index, zone in zones.items() if index not in still_online}
                back = {one.phys_index: one for one in await self._blocks.bring_back(undo)}
                self._leaving.end(index for index, one in back.items() if one.result == "failed")
            else:
                self._leaving.end([*zones, *left])
        reasons = dict.fromkeys(still_online, "not-tried") | dict.fromkeys(still_online[:1], reason)
        reasons |= {index: "undone" if one.result != "failed" else "stays-offline" for index, one in back.items()}
        return [self._result(index, zones, reasons) for index in wanted]

    async def _offline(self, zones: dict[int, Zone], deadline_s: float) -> str:
        """Try it; the reason why the first that is online then stays so."""
        if not zones:
            return ""
        if not self._has_room(len(zones) * self._size_bytes()):
            return "no-room"
        await in_thread(lambda: self._make_room(list(zones), deadline_s), name="memory-trim")
        left_s = deadline_s - time.monotonic()
        paths = [self._tree.path(f"{MEMORY}/memory{index}/state") for index in zones]
        number = await take_offline(paths, left_s)
        self._failed.forget(zones.keys() if not number else ())
        if number and left_s > 0:
            self._failed.fail([index for index in zones if self._is_online(index)][:1])
        return _REASONS.get(number) or errno.errorcode.get(number, str(number))

    def _make_room(self, going: list[int], deadline_s: float) -> None:
        """Let go of cold page cache where the rest of memory has no free place for what is in use there."""
        try:
            free_bytes = self._free_bytes(going)
        except OSError:  # it is the kernel's business then
            return
        used_bytes = len(going) * self._size_bytes() - free_bytes
        short_bytes = used_bytes + _SLACK_BYTES - (self._read_memory().free_bytes - free_bytes)
        # Half of the time at most: it is the lesser part of the work.
        left_s = (deadline_s - time.monotonic()) / 2
        if used_bytes and short_bytes > 0:
            trim(self._tree, short_bytes, timeout_s=min(TRIM_S, left_s))

    def _has_room(self, going_bytes: int) -> bool:
        """Whether the rest of memory has room for what is in use: without, the kernel would only drive all out."""
        memory = self._read_memory()
        left_bytes = memory.available_bytes + memory.swap_free_bytes - going_bytes
        return left_bytes >= floor_bytes(memory.total_bytes - going_bytes)

    def _read_memory(self) -> Meminfo:
        return parse_meminfo(self._tree.read("proc/meminfo"))

    def _note(self, results: list[BlockResult], before: Meminfo) -> None:
        """What went, and what did not, from the memory that there was."""
        failed = [one.reason for one in results if one.result == "failed"]
        why: ChangeReason = next((_GROUNDS[reason] for reason in failed if reason in _GROUNDS), "kernel")
        done = sum(1 for one in results if one.result == "done")
        size_bytes = self._size_bytes()
        numbers = {"available_bytes": before.available_bytes, "swap_free_bytes": before.swap_free_bytes}
        numbers["floor_bytes"] = floor_bytes(before.total_bytes - (done + len(failed)) * size_bytes)
        if done:
            self._decisions.note("offlined", "asked", done * size_bytes, **numbers)
        if failed:
            self._decisions.note("offline-failed", why, len(failed) * size_bytes, **numbers)

    def _result(self, index: int, zones: dict[int, Zone], reasons: dict[int, str]) -> BlockResult:
        if index in reasons:
            return BlockResult(index, zones[index], "failed", reason=reasons[index])
        if index in zones:
            return BlockResult(index, zones[index], "done")
        zone = self._leaving.zone(index) if index in self._leaving else self._blocks.zone(index)
        return BlockResult(index, zone, "already")

    def _result_of(self, dimm: Dimm) -> DimmResult:
        offline = not any(self._is_online(index) for index in dimm.indexes)
        return DimmResult(dimm.address, len(dimm.indexes) * self._size_bytes(), offline)

    def _is_online(self, index: int) -> bool:
        return self._blocks.state(index) not in ("offline", None)

    def _size_bytes(self) -> int:
        return self._blocks.block_size_bytes()
