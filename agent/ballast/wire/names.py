"""The records that extension commands and events carry, one definition for both sides (docs/protocol.md).

A field whose default is None is left out on the wire when it is None; one without a default is sent as null.
Sizes are bytes and durations milliseconds unless the name ends otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

PROTOCOL = 1
VSOCK_PORT = 640

Level = Literal["low", "medium", "critical"]
StallKind = Literal["some", "full"]
Zone = Literal["auto", "kernel", "movable"]
ProcessState = Literal["stopped", "idle", "active", "failed"]
EndReason = Literal[
    "lease-expired",
    "agent-restarted",
    "thawed-by-stranger",
    "thawed-by-qga",
    "guard-lost",
    "writer-lost",
]
RiskKind = Literal[
    "hung-task-panic",
    "watchdog",
    "nfs-export",
    "hidden-disk",
    "logger",
    "swap-file",
    "own-file",
    "fanotify",
    "timer",
    "multipath",
]


@dataclass(frozen=True, slots=True)
class Limits:
    """The longest lease, the largest balloon chunk, the longest request line."""

    lease_ms: int
    chunk_bytes: int
    line_bytes: int


@dataclass(frozen=True, slots=True)
class AgentStatus:
    """``ballast-agent-status``."""

    version: str
    protocol: int
    features: list[str]
    boot_id: str
    page_size_bytes: int
    limits: Limits
    uptime_ms: int
    peers: int
    rss_bytes: int
    psi: bool
    pin: str | None
    guard: ProcessState
    holder: ProcessState


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
    """What the balloon holds and was asked to hold."""

    bytes: int
    target_bytes: int


@dataclass(frozen=True, slots=True)
class BlockCounts:
    """Memory blocks: the size of one, and how many there are of each kind."""

    size_bytes: int
    online: int
    offline: int
    movable_online: int


@dataclass(frozen=True, slots=True)
class KernelBalloon:
    """A balloon driver of the kernel's and what it holds."""

    driver: str
    bytes: int


@dataclass(frozen=True, slots=True)
class MemoryStatus:
    """``ballast-memory-status``."""

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
class FilesystemResult:
    """One file system of a freeze. ``freezing`` means that a FIFREEZE still waits for a running writer."""

    mountpoint: str
    device: str
    type: str
    state: Literal["frozen", "freezing", "thawed", "skipped", "failed"]
    reason: str | None = None
    freeze_ms: float = 0.0


@dataclass(frozen=True, slots=True)
class WriterResult:
    """One writer of a freeze. ``lost``: it did not hold until the end; ``detail`` is its own, a log position say."""

    name: str
    state: Literal["frozen", "absent", "failed", "timed-out", "thawed", "aborted", "lost"]
    reason: str | None = None
    ms: float = 0.0
    critical: bool = False
    detail: dict[str, str] | None = None


@dataclass(frozen=True, slots=True)
class Risk:
    """What may go wrong in a freeze; ``detail`` names the culprit."""

    kind: RiskKind
    detail: str


@dataclass(frozen=True, slots=True)
class QuiesceBegun:
    """``ballast-quiesce-begin``; ``dirty_bytes`` were left to write when the freeze began, None if nobody knows."""

    id: str
    consistency: Literal["application", "filesystem", "none"]
    lease_ms: int
    sync_ms: float
    freeze_ms: float
    filesystems: list[FilesystemResult]
    writers: list[WriterResult] = field(default_factory=list)
    risks: list[Risk] = field(default_factory=list)
    dirty_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class QuiesceEnded:
    """``ballast-quiesce-end``: held is true only if every file system stayed frozen until this end thawed it."""

    held: bool
    held_ms: float
    thaw_ms: float
    reason: EndReason | None = None
    filesystems: list[FilesystemResult] = field(default_factory=list)
    writers: list[WriterResult] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class QuiesceRenewed:
    """``ballast-quiesce-renew``: what is left from now on."""

    lease_ms: int


@dataclass(frozen=True, slots=True)
class QuiesceStatus:
    """``ballast-quiesce-status``."""

    state: Literal["thawed", "freezing", "frozen", "thawing"]
    id: str | None = None
    lease_left_ms: int | None = None
    filesystems: list[FilesystemResult] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Skipped:
    """A file system that a freeze would leave out."""

    mountpoint: str
    reason: str


@dataclass(frozen=True, slots=True)
class QuiesceForecast:
    """``ballast-quiesce-forecast``: ``order`` has mount points, level by level, children before what backs them."""

    order: list[list[str]]
    skip: list[Skipped]
    risks: list[Risk]
    dirty_bytes: int


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
