"""Memory blocks: Documentation/admin-guide/mm/memory-hotplug.rst and sysfs-devices-memory (Linux 6.1, 6.12).

A block is what sysfs calls ``memoryN``, 128 MiB on small x86 guests. A hot-added DIMM appears as one range of
"System RAM" cut into blocks, each offline until somebody writes its ``state``.

The zone rule: a DIMM goes to one zone, whole; movable, so that it can be taken away again, while movable memory stays
within three times the rest, because the kernel's own data can live only in the rest.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from ballast.guest.linux.memory_hotplug import parse_virtio_mem_ranges
from ballast.guest.linux.tree import Tree
from ballast.guest.linux.zones import parse_ram_ranges, parse_zoneinfo
from ballast.guest.memory.decisions import Decisions
from ballast.guest.memory.floor import MOVABLE_RATIO
from ballast.guest.memory.offline_child import take_offline
from ballast.guest.threads import in_thread
from ballast.wire.errors import BadRequest, KernelFailure, NotSupported
from ballast.wire.memory_names import BlockCounts, BlockResult, Change, ChangeReason, OnlineResult, Zone

MEMORY = "sys/devices/system/memory"
OFFLINE_S = 10.0
_PAGE_BYTES = 4096  # zoneinfo counts base pages; x86 and the default on arm64

QgaResult = Literal["success", "not-found", "operation-not-supported", "operation-failed"]


@dataclass(frozen=True, slots=True)
class Block:
    """One memory block as sysfs shows it."""

    phys_index: int
    is_online: bool
    is_removable: bool


class Blocks:
    """The guest's memory blocks. Reading is quick; onlining takes milliseconds a block and goes to a thread.

    ``changing`` is held by whoever onlines or offlines blocks, from the first to the last of a request's.
    """

    def __init__(
        self, tree: Tree, balloon_bytes: Callable[[], int] = lambda: 0, decisions: Decisions | None = None
    ) -> None:
        self.changing = asyncio.Lock()
        self._tree = tree
        self._balloon_bytes = balloon_bytes
        self._decisions = decisions or Decisions()

    def block_size_bytes(self) -> int:
        """Size of every block. NotSupported where the kernel has no memory hot-plug."""
        try:
            return int(self._tree.read(f"{MEMORY}/block_size_bytes"), 16)
        except OSError as error:
            raise NotSupported("this kernel has no memory blocks") from error

    def read_all(self) -> list[Block]:
        """Every block, by rising index. NotSupported."""
        self.block_size_bytes()
        found = []
        for index in self.indexes():
            try:
                online = self._tree.read(f"{MEMORY}/memory{index}/state") == "online"
                removable = self._tree.read(f"{MEMORY}/memory{index}/removable") == "1"
            except OSError:  # unplugged this moment
                continue
            found.append(Block(index, online, removable))
        return found

    def offline_indexes(self) -> list[int]:
        """Blocks that are there and not online; none without memory hot-plug."""
        return [index for index in self.indexes() if self.state(index) == "offline"]

    def counts(self) -> BlockCounts:
        """How many blocks there are of each kind; all zero without memory hot-plug."""
        try:
            size_bytes = self.block_size_bytes()
        except NotSupported:
            return BlockCounts(0, 0, 0, 0)
        states = {index: self.state(index) for index in self.indexes()}
        online = [index for index, state in states.items() if state == "online"]
        movable = sum(1 for index in online if self.zone(index) == "movable")
        return BlockCounts(size_bytes, len(online), sum(1 for s in states.values() if s == "offline"), movable)

    async def online(
        self,
        *,
        bytes_: int | None = None,
        indexes: Sequence[int] | None = None,
        zone: Zone = "auto",
        spared: Collection[int] = (),
    ) -> OnlineResult:
        """Bring blocks online: those in ``indexes``, or of the offline ones no more than ``bytes_``, or all.

        ``bytes_`` takes none of ``spared``. One result a block; a block that fails does not stop the others.
        BadRequest for an unknown index.
        """
        size_bytes = self.block_size_bytes()
        if indexes is None:
            indexes = self.offline_indexes()
            if bytes_ is not None:
                indexes = [index for index in indexes if index not in spared][: bytes_ // size_bytes]
        unknown = [index for index in indexes if self.state(index) is None]
        if unknown:
            raise BadRequest(f"Parameter 'blocks' names no memory block: {unknown}", argument="blocks")
        async with self.changing:
            results = await in_thread(lambda: self._online_now(indexes, zone), name="memory-online")
        self.note(results, "asked")
        done = sum(1 for result in results if result.result == "done")
        return OnlineResult(done * size_bytes, results)

    async def online_next(self, next_index: Callable[[], int | None]) -> list[BlockResult]:
        """Online by the zone rule what ``next_index`` names, called in a thread, one after another until it is None.

        One result a block, but for those that are gone. For a DIMM whose blocks still come: nothing is looked at twice.
        """
        async with self.changing:
            return await in_thread(lambda: self._online_next(next_index), name="memory-online")

    def note(self, results: Iterable[BlockResult], reason: ChangeReason) -> None:
        """Note what came online, or did not, and what there is of both kinds of memory now."""
        counted = Counter((one.result, one.zone) for one in results if one.result != "already")
        numbers = {}
        with contextlib.suppress(KernelFailure):  # memory is short
            numbers["movable_bytes"], numbers["kernel_bytes"] = self._zone_bytes()
        for (result, zone), count in counted.items():
            change: Change = "onlined-movable" if zone == "movable" else "onlined-kernel"
            done = result == "done"
            self._decisions.note(
                change if done else "online-failed",
                reason if done else "kernel",
                count * self.block_size_bytes(),
                **numbers,
            )

    async def bring_back(self, zones: Mapping[int, Zone]) -> list[BlockResult]:
        """Online each block in the zone given, for who holds ``changing``. One result a block."""
        return await in_thread(
            lambda: [result for index, zone in zones.items() for result in self._online_now([index], zone)],
            name="memory-online",
        )

    async def set_state(self, index: int, *, online: bool) -> tuple[QgaResult, int | None]:
        """Bring one block online or offline, with QGA's answer: a result and an errno. Takes ``OFFLINE_S`` at most."""
        state = self.state(index)
        if state is None:
            return "not-found", errno.ENOENT
        if (state == "online") == online:
            return "success", None
        path = f"{MEMORY}/memory{index}/state"
        async with self.changing:
            if online:
                # By the zone rule too: to a plain "online" the kernel answers with its own zone for the last blocks
                # of a DIMM, which then cannot be unplugged any more.
                number = await in_thread(
                    lambda: self._write(path, f"online_{self.zone_for(self.dimm_of(index))}"), name="memory-online"
                )
            elif self._is_virtio_mem(index):
                return "operation-not-supported", None  # its driver unplugs parts of blocks, and knows which
            else:
                number = await take_offline([self._tree.path(path)], OFFLINE_S)
        return ("operation-failed", number) if number else ("success", None)

    def _online_now(self, indexes: Iterable[int], zone: Zone) -> list[BlockResult]:
        zones = _Zones(self)
        results = []
        for index in indexes:
            if self.state(index) == "online":
                results.append(BlockResult(index, self.zone(index), "already"))
            else:
                results.append(self._online_one(index, zones.of(index) if zone == "auto" else zone))
        return results

    def _online_next(self, next_index: Callable[[], int | None]) -> list[BlockResult]:
        zones = _Zones(self)
        results = []
        while (index := next_index()) is not None:
            result = self._online_one(index, zones.of(index))
            if result.result != "failed" or self.state(index) is not None:
                results.append(result)
        return results

    def _online_one(self, index: int, zone: Zone) -> BlockResult:
        started_s = time.monotonic()
        number = self._write(f"{MEMORY}/memory{index}/state", f"online_{zone}")
        if number == errno.EINVAL and self.state(index) == "online":
            return BlockResult(index, self.zone(index), "already")
        if number:
            reason = errno.errorcode.get(number, str(number))
            return BlockResult(index, zone, "failed", reason=reason)
        return BlockResult(index, zone, "done", online_us=round(1_000_000 * (time.monotonic() - started_s)))

    def _write(self, path: str, value: str) -> int:
        """Return the errno, 0 if the kernel did it. Blocks for as long as the kernel needs."""
        try:
            self._tree.write(path, value)
        except OSError as error:
            return error.errno or errno.EIO
        return 0

    def _is_virtio_mem(self, index: int) -> bool:
        address = index * self.block_size_bytes()
        ranges = parse_virtio_mem_ranges(self._tree.read("proc/iomem"))
        return any(first <= address < first + range_bytes for first, range_bytes in ranges)

    def dimm_of(self, index: int) -> tuple[int, int]:
        """The range (first byte, bytes) of RAM that was added in one piece with this block.

        Not ``read_dimms``: when the kernel tells of a new block, ACPI's device is not bound to it yet.
        """
        size_bytes = self.block_size_bytes()
        address = index * size_bytes
        for first, range_bytes in parse_ram_ranges(self._tree.read("proc/iomem")):
            if first <= address < first + range_bytes:
                return first, range_bytes
        return address, size_bytes

    def zone_for(self, dimm: tuple[int, int]) -> Zone:
        """The zone of what is online of this DIMM, or else the zone rule's."""
        first, dimm_bytes = dimm
        size_bytes = self.block_size_bytes()
        for index in range(first // size_bytes, (first + dimm_bytes) // size_bytes):
            if self.state(index) == "online":
                return "movable" if self.zone(index) == "movable" else "kernel"
        movable_bytes, kernel_bytes = self._zone_bytes()
        return "movable" if movable_bytes + dimm_bytes <= MOVABLE_RATIO * kernel_bytes else "kernel"

    def _zone_bytes(self) -> tuple[int, int]:
        """Movable memory that is online, and what the kernel has besides, without the balloon."""
        try:
            zones = parse_zoneinfo(self._tree.read("proc/zoneinfo"))
        except OSError as error:
            raise KernelFailure.of("read", "/proc/zoneinfo", error) from error
        return zones.movable_pages * _PAGE_BYTES, zones.kernel_pages * _PAGE_BYTES - self._balloon_bytes()

    def zone(self, index: int) -> Zone:
        """The zone that an online block is in: the one entry of its ``valid_zones``."""
        try:
            return (
                "movable" if self._tree.read(f"{MEMORY}/memory{index}/valid_zones").startswith("Movable") else "kernel"
            )
        except OSError:
            return "kernel"

    def state(self, index: int) -> str | None:
        """online, offline or going-offline; None if there is no such block."""
        try:
            return self._tree.read(f"{MEMORY}/memory{index}/state")
        except OSError:
            return None

    def indexes(self) -> list[int]:
        """Every block that there is, rising; none without memory hot-plug."""
        names = self._tree.names(MEMORY)
        return sorted(int(name[6:]) for name in names if name.startswith("memory") and name[6:].isdigit())


class _Zones:
    """The zone of each DIMM, looked up once and then known: a look costs as much as onlining a block."""

    def __init__(self, blocks: Blocks) -> None:
        self._blocks = blocks
        self._size_bytes = blocks.block_size_bytes()
        self._known: dict[tuple[int, int], Zone] = {}

    def of(self, index: int) -> Zone:
        """By the zone rule, for a block of a DIMM of which blocks may be online."""
        address = index * self._size_bytes
        for (first, dimm_bytes), zone in self._known.items():
            if first <= address < first + dimm_bytes:
                return zone
        dimm = self._blocks.dimm_of(index)
        return self._known.setdefault(dimm, self._blocks.zone_for(dimm))
