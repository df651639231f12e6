"""How long tasks stall for memory where the kernel has no PSI, estimated from what it counts; and that it is one.

Two counters: allocations that had to reclaim by themselves, and pages read back that were driven out not long before.
Each is given a price in time. In a guest that read 720 refaulted pages a second some task stalled for 15 % of the time,
by 4,500 for 33 %, by 20,000 for 45 %: the estimate exaggerates rather than it plays down. Whether all tasks stalled no
counter tells; ten times what is medium counts as critical.
"""

from __future__ import annotations

from collections.abc import Callable

from ballast.guest.linux.tree import Tree
from ballast.guest.linux.vmstat import parse_vmstat

REFAULT_S, RECLAIM_S = 0.0001, 0.001  # a fast disk's read; a pass of direct reclaim
FULL_SHARE = 0.1
# Readings that come closer together are told what the last ones were: two pages in a millisecond are no thrashing.
LEAST_S = 0.5


class StallRates:
    """Shares of time since the last reading, or over the whole of a long gap; none at the first."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._before: tuple[float, float] | None = None  # when, and seconds stalled since boot
        self._percents = (0.0, 0.0)

    def read(self, tree: Tree) -> tuple[float, float]:
        """``some`` and ``full`` in percent; the last ones where nothing can be read."""
        try:
            counts = parse_vmstat(tree.read("proc/vmstat"))
        except (OSError, ValueError):
            return self._percents
        refaults = counts.refault_anon_pages + counts.refault_file_pages
        now_s, stalled_s = self._clock(), REFAULT_S * refaults + RECLAIM_S * (counts.stalls or 0)
        if self._before is None:
            self._before = now_s, stalled_s
        elif now_s - self._before[0] >= LEAST_S:
            percent = 100 * (stalled_s - self._before[1]) / (now_s - self._before[0])
            self._percents = min(100.0, percent), min(100.0, FULL_SHARE * percent)
            self._before = now_s, stalled_s
        return self._percents
