"""The records of the commands and events about memory, one definition for both sides (docs/protocol.md).

As in ``names``: a field whose default is None is left out on the wire when it is None, sizes are bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Level = Literal["low", "medium", "critical"]
StallKind = Literal["some", "full"]
LevelSource = Literal["slices", "system", "vmstat"]
Zone = Literal["auto", "kernel", "movable"]
# What became of memory, and why: docs/protocol.md explains the words.
Change = Literal[
    "onlined-movable",
    "onlined-kernel",
    "online-failed",
    "offlined",
    "offline-failed",
    "inflated",
    "not-inflated",
    "deflated",
    "gave-way",
    "holder-lost",
    "policy-set",
    "policy-restored",
]
ChangeReason = Literal[
    "asked",
    "zone-rule",
    "not-unplugged",
    "floor",
    "pressure",
    "short",
    "moved",
    "suspend",
    "no-room",
    "deadline",
    "kernel",
    "configured",
    "killed",
]


@dataclass(frozen=True, slots=True)
class Stall:
    """One line of a pressure file: shares of time in percent, and the total stalled since boot."""

    avg10: float
    avg60: float
    avg300: float
    total_us: int


@dataclass(frozen=True, slots=True)
class Pressure:
    """/proc/pressure/memory: ``some`` task stalled, or all of them (``full``)."""

    some: Stall
    full: Stall


@dataclass(frozen=True, slots=True)
class BalloonState:
    """What the balloon holds and was asked to hold; ``fault``: a pinned page has moved, so that no more is taken."""

    bytes: int
    target_bytes: int
    fault: Literal["moved"] | None = None


@dataclass(frozen=True, slots=True)
class BlockCounts:
    """Memory blocks: the size of one, and how many there are of each kind."""

    size_bytes: int
    online: int
    offline: int
    movable_online: int


@dataclass(frozen=True, slots=True)
class KernelBalloon:
    """A balloon driver of the kernel's and what it holds, None where it does not tell; the rest is since boot."""

    driver: str
    bytes: int | None
    inflated_bytes: int | None = None
    deflated_bytes: int | None = None
    migrated_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class LruLists:
    """Active memory, used lately, and inactive memory, which goes first: by the kernel's lists, without the balloon."""

    active_anon_bytes: int
    inactive_anon_bytes: int
    active_file_bytes: int
    inactive_file_bytes: int


@dataclass(frozen=True, slots=True)
class MemoryStatus:
    """``ballast-memory-status``. ``psi`` is system-wide; ``level`` is of what ``level_source`` tells."""

    boot_id: str
    total_bytes: int
    available_bytes: int
    free_bytes: int
    cached_bytes: int
    committed_bytes: int
    swap_total_bytes: int
    swap_free_bytes: int
    psi: Pressure | None
    level: Level
    demand_bytes: int
    demand: dict[str, int]
    balloon: BalloonState
    blocks: BlockCounts
    kernel_balloon: KernelBalloon | None
    level_source: LevelSource | None = None
    psi_cgroups: dict[str, Pressure] | None = None
    lru: LruLists | None = None


@dataclass(frozen=True, slots=True)
class BlockResult:
    """What became of one memory block; ``online_us`` is how long the kernel took."""

    phys_index: int
    zone: str
    result: Literal["done", "already", "failed"]
    reason: str | None = None
    online_us: int | None = None


@dataclass(frozen=True, slots=True)
class OnlineResult:
    """``ballast-memory-online``: bytes that were brought online now, and each block."""

    bytes: int
    blocks: list[BlockResult]


@dataclass(frozen=True, slots=True)
class DimmResult:
    """A DIMM: its first guest-physical address, and whether all of its blocks are offline, so that it can come off."""

    address: int
    bytes: int
    offline: bool


@dataclass(frozen=True, slots=True)
class OfflineResult:
    """``ballast-memory-offline``: bytes that were taken offline now, each block, and the DIMMs that they are."""

    bytes: int
    blocks: list[BlockResult]
    dimms: list[DimmResult]


# Guest-physical memory: [address, bytes] each, rising, none overlapping another.
Ranges = list[list[int]]


@dataclass(frozen=True, slots=True)
class BalloonInflated:
    """``ballast-balloon-inflate``: the chunk that waits for its ack, None if none was taken.

    ``done``: the target is reached. ``floor``: the guest gives no more now.
    """

    chunk: int | None
    bytes: int
    total_bytes: int
    ranges: Ranges
    done: bool
    floor: bool


@dataclass(frozen=True, slots=True)
class BalloonDeflated:
    """``ballast-balloon-deflate``: what the guest has again."""

    bytes: int
    total_bytes: int
    ranges: Ranges


@dataclass(frozen=True, slots=True)
class BalloonRanges:
    """``ballast-balloon-ranges``: all that the balloon holds, looked up now; ``generation`` changes with it."""

    boot_id: str
    generation: int
    total_bytes: int
    ranges: Ranges


@dataclass(frozen=True, slots=True)
class Decision:
    """A change of memory, or one that did not come about, of so many bytes; ``numbers`` are what it was decided from.

    ``at_ms``: by the guest's clock, since 1970. The numbers carry their units in their names.
    """

    at_ms: int
    change: Change
    bytes: int
    reason: ChangeReason
    numbers: dict[str, float]


@dataclass(frozen=True, slots=True)
class PsiTrigger:
    """Ask for an event when tasks stall for ``stall_us`` within ``window_us`` (500,000 to 10,000,000)."""

    kind: StallKind
    stall_us: int
    window_us: int


@dataclass(frozen=True, slots=True)
class DemandInterval:
    """Ask for BALLAST_DEMAND every ``interval_ms`` (100 to 3,600,000)."""

    interval_ms: int
