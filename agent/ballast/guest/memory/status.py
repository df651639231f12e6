"""All about memory in one record: totals from psutil, pressure, demand, blocks."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable

import psutil

from ballast.guest.events import Subscription
from ballast.guest.linux.tree import Tree
from ballast.guest.memory.balloon import Balloon
from ballast.guest.memory.blocks import Blocks
from ballast.guest.memory.demand import demand_parts
from ballast.guest.memory.pressure import Pressure, level_of
from ballast.wire import memory_names as names
from ballast.wire.shape import to_wire

_COMMITTED = re.compile(r"^Committed_AS: +(\d+) kB", re.MULTILINE)


class MemoryFacts:
    """Reads; changes nothing. May run while frozen: /proc and /sys are no disks."""

    def __init__(self, tree: Tree, pressure: Pressure, blocks: Blocks, balloon: Balloon, *, boot_id: str) -> None:
        self._tree = tree
        self._pressure = pressure
        self._blocks = blocks
        self._balloon = balloon
        self._boot_id = boot_id
        psutil.PROCFS_PATH = str(tree.path("proc"))

    def read(self) -> names.MemoryStatus:
        """One consistent reading of everything; a few milliseconds."""
        memory, swap = psutil.virtual_memory(), psutil.swap_memory()
        stalls = self._pressure.read()
        balloon = self._balloon.state()
        # The balloon's pages are no need of the guest's, although the kernel counts them as used.
        parts = demand_parts(total_bytes=memory.total - balloon.bytes, available_bytes=memory.available)
        return names.MemoryStatus(
            boot_id=self._boot_id,
            total_bytes=memory.total,
            available_bytes=memory.available,
            free_bytes=memory.free,
            cached_bytes=memory.cached,
            committed_bytes=self._committed_bytes(),
            swap_total_bytes=swap.total,
            swap_free_bytes=swap.free,
            psi=names.Pressure(_stall(stalls.some), _stall(stalls.full)) if stalls else None,
            level=level_of(stalls.some.avg10, stalls.full.avg10) if stalls else "low",
            demand_bytes=sum(parts.values()),
            demand=parts,
            balloon=balloon,
            blocks=self._blocks.counts(),
            kernel_balloon=None,
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

    def _committed_bytes(self) -> int:
        """Committed_AS, which psutil leaves out (Documentation/filesystems/proc.rst); in KiB there."""
        match = _COMMITTED.search(self._tree.read("proc/meminfo"))
        return 1024 * int(match.group(1)) if match else 0


def _stall(line: object) -> names.Stall:
    return names.Stall(**{field: getattr(line, field) for field in ("avg10", "avg60", "avg300", "total_us")})
