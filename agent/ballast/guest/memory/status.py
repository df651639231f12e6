"""All about memory in one record: totals, pressure, demand, blocks."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from ballast.guest.events import Subscription
from ballast.guest.linux.meminfo import parse_meminfo
from ballast.guest.linux.tree import Tree
from ballast.guest.memory.balloon import Balloon
from ballast.guest.memory.blocks import Blocks
from ballast.guest.memory.demand import demand_parts
from ballast.guest.memory.pressure import Pressure, level_of
from ballast.wire import memory_names as names
from ballast.wire.shape import to_wire


class MemoryFacts:
    """Reads; changes nothing. May run while frozen: /proc and /sys are no disks."""

    def __init__(self, tree: Tree, pressure: Pressure, blocks: Blocks, balloon: Balloon, *, boot_id: str) -> None:
        self._tree = tree
        self._pressure = pressure
        self._blocks = blocks
        self._balloon = balloon
        self._boot_id = boot_id

    def read(self) -> names.MemoryStatus:
        """One consistent reading of everything; a few milliseconds."""
        memory = parse_meminfo(self._tree.read("proc/meminfo"))
        stalls = self._pressure.read()
        balloon = self._balloon.state()
        # The balloon's pages are no need of the guest's, although the kernel counts them as used.
        parts = demand_parts(total_bytes=memory.total_bytes - balloon.bytes, available_bytes=memory.available_bytes)
        return names.MemoryStatus(
            boot_id=self._boot_id,
            total_bytes=memory.total_bytes,
            available_bytes=memory.available_bytes,
            free_bytes=memory.free_bytes,
            cached_bytes=memory.cached_bytes,
            committed_bytes=memory.committed_bytes,
            swap_total_bytes=memory.swap_total_bytes,
            swap_free_bytes=memory.swap_free_bytes,
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


def _stall(line: object) -> names.Stall:
    return names.Stall(**{field: getattr(line, field) for field in ("avg10", "avg60", "avg300", "total_us")})
