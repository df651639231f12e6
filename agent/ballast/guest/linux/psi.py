"""Pressure stall information: Documentation/accounting/psi.rst (read for Linux 6.1 and 6.12).

A line reads ``some avg10=0.12 avg60=0.05 avg300=0.01 total=123456``; the averages are percent, the total µs.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

PRESSURE_FILE = "proc/pressure/memory"  # and, of a control group, its memory.pressure
WINDOW_MIN_US, WINDOW_MAX_US = 500_000, 10_000_000


@dataclass(frozen=True, slots=True)
class StallLine:
    """One line: averages in percent of time, total in µs since boot."""

    avg10: float
    avg60: float
    avg300: float
    total_us: int


@dataclass(frozen=True, slots=True)
class StallFile:
    """A pressure file: at least one task stalled (``some``), all of them (``full``)."""

    some: StallLine
    full: StallLine


def parse_stalls(text: str) -> StallFile:
    """Parse a pressure file; fields and lines that later kernels add are passed over; ValueError if any is missing."""
    lines: dict[str, StallLine] = {}
    for line in text.splitlines():
        kind, *fields = line.split()
        values = dict(field.split("=", 1) for field in fields)
        if len(values) != len(fields) or kind in lines:
            raise ValueError(f"repeated field in pressure line {line!r}")
        if kind in ("some", "full"):
            try:
                avg10, avg60, avg300 = (float(values[name]) for name in ("avg10", "avg60", "avg300"))
                lines[kind] = StallLine(avg10, avg60, avg300, int(values["total"]))
            except KeyError as error:
                raise ValueError(f"pressure line {line!r} lacks {error}") from error
    try:
        return StallFile(lines["some"], lines["full"])
    except KeyError as error:
        raise ValueError(f"pressure file lacks the line {error}") from error


def open_trigger(path: Path, kind: str, *, stall_us: int, window_us: int) -> int:
    """Arm a trigger and return its descriptor, readable as POLLPRI at most once a window.

    One trigger for each descriptor; closing it disarms. OSError: EINVAL for a stall or window out of range, EPERM
    without CAP_SYS_RESOURCE, EOPNOTSUPP where PSI is off, ENOENT where the kernel has none.
    """
    fd = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        # The kernel overwrites the last byte that is written, so the text must end with one to spare.
        os.write(fd, f"{kind} {stall_us} {window_us}\0".encode())
    except OSError:
        os.close(fd)
        raise
    return fd
