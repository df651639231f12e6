"""The records that extension commands and events carry, one definition for both sides (docs/protocol.md).

A field whose default is None is left out on the wire when it is None; one without a default is sent as null.
Sizes are bytes and durations milliseconds unless the name ends otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

PROTOCOL = 1
VSOCK_PORT = 640

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
