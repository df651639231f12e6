"""How much memory the guest needs: pure functions over readings, in named parts whose sum is the demand.

The law: what programs hold, now or lately, whichever is most; the page cache that is in use; half of what programs were
promised beyond that, a quarter of the memory at most; never less than the floor; and up to a quarter more where tasks
stall for memory. What is learnt between readings goes by the time between them, so it does not matter who reads or how
often, and nothing runs in between:

- at the first reading the averages are what is held now, and no cache is known to be hot: counters since boot say
  nothing about today;
- after a long gap the averages are nearly what is held at its end, since nobody looked at what was before, and refaults
  count as if they had come evenly over the gap.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ballast.guest.linux.meminfo import Meminfo
from ballast.guest.linux.vmstat import Vmstat
from ballast.guest.memory.floor import floor_bytes

# Of what programs hold: follows a burst, and remembers one (Waldspurger, OSDI 2002: the most of three averages).
FAST_S, SLOW_S = 5.0, 60.0
# Refaulted pages are half forgotten after three minutes.
HOT_HALF_LIFE_S = 180.0
PROMISED_SHARE, PROMISED_LIMIT_SHARE = 0.5, 0.25
# With 5 % of the time stalled the demand is a quarter more.
STALLED_PERCENT, STALLED_SHARE = 5.0, 0.25
_ALWAYS_ACCOUNTED = 2  # OVERCOMMIT_NEVER, include/uapi/linux/mman.h


@dataclass(frozen=True, slots=True)
class Reading:
    """One look, in bytes, without the balloon's own pages. ``refaulted_bytes`` counts since boot."""

    at_s: float
    usable_bytes: int
    unreclaimable_bytes: int
    swapped_bytes: int
    cache_bytes: int
    refaulted_bytes: int
    promised_bytes: int

    @property
    def held_bytes(self) -> int:
        """What programs and the kernel hold, in memory or swapped out."""
        return self.unreclaimable_bytes + self.swapped_bytes


@dataclass(frozen=True, slots=True)
class Learnt:
    """What earlier readings left."""

    at_s: float
    fast_bytes: float
    slow_bytes: float
    hot_bytes: float
    refaulted_bytes: int


def read_demand(
    memory: Meminfo, counters: Vmstat, *, at_s: float, balloon_bytes: int, overcommit: int, page_bytes: int
) -> Reading:
    """Put a reading together. ``overcommit`` is /proc/sys/vm/overcommit_memory.

    The balloon is memory of a process's: in MemTotal, not in MemAvailable, and no need of the guest's.
    """
    usable_bytes = max(0, memory.total_bytes - balloon_bytes)
    return Reading(
        at_s=at_s,
        usable_bytes=usable_bytes,
        unreclaimable_bytes=max(0, usable_bytes - memory.available_bytes),
        swapped_bytes=swapped_bytes(memory, counters.zspages * page_bytes),
        cache_bytes=memory.active_file_bytes + memory.inactive_file_bytes,
        refaulted_bytes=counters.refault_file_pages * page_bytes,
        promised_bytes=promised_bytes(memory, balloon_bytes, overcommit),
    )


def swapped_bytes(memory: Meminfo, compressed_bytes: int) -> int:
    """What programs hold in swap alone: a guest that swaps looks healthier by MemAvailable, and is not.

    Without SwapCached, which is in memory too, and without what zswap and zram take of memory for it, which is not
    available either (Documentation/filesystems/proc.rst: SwapFree, SwapCached, Zswap; nr_zspages in mm/zsmalloc.c).
    """
    out_bytes = memory.swap_total_bytes - memory.swap_free_bytes - memory.swap_cached_bytes
    return max(0, out_bytes - max(memory.zswap_bytes, compressed_bytes))


def promised_bytes(memory: Meminfo, balloon_bytes: int, overcommit: int) -> int:
    """Committed_AS without the balloon, which is in it only where MAP_NORESERVE is ignored.

    Documentation/mm/overcommit-accounting.rst; 128 MiB of balloon were 0 of it with mode 0, and all with mode 2.
    """
    return max(0, memory.committed_bytes - (balloon_bytes if overcommit == _ALWAYS_ACCOUNTED else 0))


def learn(before: Learnt | None, now: Reading) -> Learnt:
    """Take in a reading. What came before may be any time ago."""
    held_bytes = float(now.held_bytes)
    if before is None:
        return Learnt(now.at_s, held_bytes, held_bytes, 0.0, now.refaulted_bytes)
    passed_s = max(0.0, now.at_s - before.at_s)
    return Learnt(
        at_s=now.at_s,
        fast_bytes=_average(before.fast_bytes, held_bytes, passed_s, FAST_S),
        slow_bytes=_average(before.slow_bytes, held_bytes, passed_s, SLOW_S),
        hot_bytes=min(
            _hot_bytes(before.hot_bytes, now.refaulted_bytes - before.refaulted_bytes, passed_s), now.cache_bytes
        ),
        refaulted_bytes=now.refaulted_bytes,
    )


def demand_parts(now: Reading, learnt: Learnt, *, stalled_percent: float) -> dict[str, int]:
    """Named parts whose sum is the demand. ``learnt`` is as of this reading.

    ``unreclaimable`` (usable memory less MemAvailable), ``swapped``, ``lately`` (what the averages are above these),
    ``hot-cache``, ``promised``, ``floor`` (what the guest needs to live at all), ``pressure``.
    """
    parts = {"unreclaimable": now.unreclaimable_bytes, "swapped": now.swapped_bytes}
    parts["lately"] = max(0, round(max(learnt.fast_bytes, learnt.slow_bytes)) - now.held_bytes)
    parts["hot-cache"] = round(learnt.hot_bytes)
    excess_bytes = max(0, now.promised_bytes - sum(parts.values()))
    parts["promised"] = round(min(PROMISED_SHARE * excess_bytes, PROMISED_LIMIT_SHARE * now.usable_bytes))
    parts["floor"] = max(0, floor_bytes(now.usable_bytes) - sum(parts.values()))
    share = STALLED_SHARE * min(1.0, max(0.0, stalled_percent) / STALLED_PERCENT)
    parts["pressure"] = round(share * sum(parts.values()))
    return parts


def _average(before: float, now: float, passed_s: float, tau_s: float) -> float:
    """Exponentially weighted by time: a = 1 - exp(-dt / tau)."""
    return before + (now - before) * -math.expm1(-passed_s / tau_s)


def _hot_bytes(before: float, refaulted_bytes: int, passed_s: float) -> float:
    """What is left of ``before``, and of what was refaulted since, spread evenly over that time."""
    decay = math.log(2) * passed_s / HOT_HALF_LIFE_S
    spread = -math.expm1(-decay) / decay if decay > 0 else 1.0
    return before * math.exp(-decay) + max(0, refaulted_bytes) * spread
