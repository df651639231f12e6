"""Which of the guest's physical addresses are RAM, and where in QEMU's own memory: found by asking, page by page.

`gpa2hva` answers for one address; a run is what is in one piece, and its end is found by halving. `info mtree -f`
would tell all at once, but QEMU (7.2 to 10.0, print_flatview_info) forgets to let go of the views that it shows: a DIMM
that is there at the time is never freed after its removal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ballast.host.machine import LOWEST_ADDRESS, PAGE_BYTES, NotReclaimable, QmpFailed
from ballast.host.monitor import RamBlock, parse_host_address
from ballast.host.qmp import Qmp

# Where a PC's RAM goes on beyond the devices below 4 GiB, whatever the size of that hole (hw/i386/pc.c).
_ABOVE_4G = 4 << 30


@dataclass(frozen=True, slots=True)
class Run:
    """RAM that is in one piece: at ``address`` for the guest, ``offset`` in a block of QEMU's."""

    address: int
    bytes: int
    block: RamBlock
    offset: int

    @property
    def host_address(self) -> int:
        """Where it is in QEMU's own memory."""
        return self.block.address + self.offset


class Physical:
    """The guest's physical addresses, as QEMU has them at the moment."""

    def __init__(self, qmp: Qmp, blocks: Sequence[RamBlock]) -> None:
        self._qmp = qmp
        self._blocks = blocks

    async def runs(self) -> list[Run]:
        """All memory of the guest's from LOWEST_ADDRESS on, rising. NotReclaimable, QmpFailed, ValueError."""
        memory = {one["id"] for one in await self._qmp.run("query-memdev")}
        if await self._ask(LOWEST_ADDRESS) is None:
            raise NotReclaimable(f"the machine has no RAM at {LOWEST_ADDRESS:#x}: it is no PC")
        found: dict[int, Run] = {}
        for start in (LOWEST_ADDRESS, _ABOVE_4G, *await self._device_addresses()):
            address = start
            # Right behind a run can be another: each NUMA node has memory of its own, and so has a DIMM.
            while address not in found and (run := await self._run(address)) and _name(run.block) in memory:
                found[address] = run
                address += run.bytes
        return [found[address] for address in sorted(found)]

    async def holds(self, run: Run) -> bool:
        """Whether a run that was found before still is where it was, looked at by both its ends."""
        first, last = run.host_address, run.host_address + run.bytes - 1
        return await self._ask(run.address) == first and await self._ask(run.address + run.bytes - 1) == last

    async def _device_addresses(self) -> list[int]:
        """Where DIMMs and the like begin: ``addr``, or ``memaddr`` of a virtio-mem."""
        devices = [one["data"] for one in await self._qmp.run("query-memory-devices")]
        return [one["addr"] if "addr" in one else one["memaddr"] for one in devices]

    async def _run(self, address: int) -> Run | None:
        """What is in one piece from this address on, at most to the end of its block; None if it is no RAM."""
        host_address = await self._ask(address)
        if host_address is None:
            return None
        block = next((b for b in self._blocks if b.address <= host_address < b.address + b.bytes), None)
        if block is None:
            raise QmpFailed(f"QEMU has RAM at {address:#x}, which is in none of its RAM blocks")
        offset = host_address - block.address
        # So many pages are known to be in this piece, and so many at the most.
        certain, possible = 1, (block.bytes - offset) // PAGE_BYTES
        trial = possible
        while certain < possible:
            if await self._ask(address + trial * PAGE_BYTES - 1) == host_address + trial * PAGE_BYTES - 1:
                certain = trial
            else:
                possible = trial - 1
            trial = (certain + possible + 1) // 2
        return Run(address, certain * PAGE_BYTES, block, offset)

    async def _ask(self, address: int) -> int | None:
        return parse_host_address(await self._qmp.ask_monitor(f"gpa2hva {address:#x}"))


def _name(block: RamBlock) -> str:
    """A block is called as its memory back end, perhaps behind a path: /objects/ram, 0000:00:01.0/vm."""
    return block.name.rpartition("/")[2]
