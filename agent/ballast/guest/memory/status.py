"""All about memory in one record: totals, pressure, demand, blocks."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable

from ballast.guest.events import Subscription
from ballast.guest.linux.meminfo import Meminfo, parse_meminfo
from ballast.guest.linux.memory_stat import parse_anon_lists
from ballast.guest.linux.psi import StallFile
from ballast.guest.linux.tree import Tree
from ballast.guest.linux.vmstat import parse_vmstat
from ballast.guest.memory.balloon import Balloon
from ballast.guest.memory.blocks import Blocks
from ballast.guest.memory.demand import Learnt, demand_parts, learn, read_demand
from ballast.guest.memory.kernel_balloon import kernel_balloon
from ballast.guest.memory.level import PressureLevel
from ballast.wire import memory_names as names
from ballast.wire.shape import to_wire

_HOLDER_STAT = "sys/fs/cgroup/ballast.slice/ballast-balloon.service/memory.stat"


class MemoryFacts:
    """Reads; changes nothing but what it has learnt. May run while frozen: /proc and /sys are no disks."""

    def __init__(self, tree: Tree, level: PressureLevel, blocks: Blocks, balloon: Balloon, *, boot_id: str) -> None:
        self._tree = tree
        self._level = level
        self._blocks = blocks
        self._balloon = balloon
        self._boot_id = boot_id
        self._learnt: Learnt | None = None
        self._page_bytes = os.sysconf("SC_PAGESIZE")

    def read(self) -> names.MemoryStatus:
        """One consistent reading of everything; less than a millisecond, and more with hundreds of blocks."""
        memory = parse_meminfo(self._tree.read("proc/meminfo"))
        look = self._level.look()
        balloon = self._balloon.state()
        parts = self._demand(memory, balloon.bytes, look.some_percent)
        return names.MemoryStatus(
            boot_id=self._boot_id,
            total_bytes=memory.total_bytes,
            available_bytes=memory.available_bytes,
            free_bytes=memory.free_bytes,
            cached_bytes=memory.cached_bytes,
            committed_bytes=memory.committed_bytes,
            swap_total_bytes=memory.swap_total_bytes,
            swap_free_bytes=memory.swap_free_bytes,
            psi=_pressure(look.system) if look.system else None,
            level=look.level,
            demand_bytes=sum(parts.values()),
            demand=parts,
            balloon=balloon,
            blocks=self._blocks.counts(),
            kernel_balloon=kernel_balloon(self._tree),
            level_source=look.source,
            psi_cgroups={name: _pressure(stalls) for name, stalls in look.groups.items()} or None,
            lru=self._lru(memory, balloon.bytes),
        )

    def report_every(self, interval_s: float, subscription: Subscription) -> Callable[[], None]:
        """Send BALLAST_DEMAND now and every ``interval_s``; returns what stops it."""
        loop = asyncio.get_running_loop()
        timer: asyncio.TimerHandle | None = None

        def report() -> None:
            nonlocal timer
            timer = loop.call_later(interval_s, report)
            if not subscription.send("BALLAST_DEMAND", to_wire(self.read())):
                timer.cancel()

        def stop() -> None:
            if timer is not None:
                timer.cancel()

        timer = loop.call_later(0, report)
        return stop

    def _demand(self, memory: Meminfo, balloon_bytes: int, stalled_percent: float) -> dict[str, int]:
        reading = read_demand(
            memory,
            parse_vmstat(self._tree.read("proc/vmstat")),
            at_s=time.monotonic(),
            balloon_bytes=balloon_bytes,
            overcommit=int(self._tree.read("proc/sys/vm/overcommit_memory")) if balloon_bytes else 0,
            page_bytes=self._page_bytes,
        )
        self._learnt = learn(self._learnt, reading)
        return demand_parts(reading, self._learnt, stalled_percent=stalled_percent)

    def _lru(self, memory: Meminfo, balloon_bytes: int) -> names.LruLists | None:
        """The lists without the balloon's pages; None where the kernel does not tell on which of them these are."""
        active_bytes = inactive_bytes = 0
        if balloon_bytes:
            try:
                holder = parse_anon_lists(self._tree.read(_HOLDER_STAT))
            except (OSError, ValueError):
                return None
            active_bytes, inactive_bytes = holder.active_bytes, holder.inactive_bytes
        return names.LruLists(
            active_anon_bytes=max(0, memory.active_anon_bytes - active_bytes),
            inactive_anon_bytes=max(0, memory.inactive_anon_bytes - inactive_bytes),
            active_file_bytes=memory.active_file_bytes,
            inactive_file_bytes=memory.inactive_file_bytes,
        )


def _pressure(stalls: StallFile) -> names.Pressure:
    some, full = (
        names.Stall(line.avg10, line.avg60, line.avg300, line.total_us) for line in (stalls.some, stalls.full)
    )
    return names.Pressure(some, full)
