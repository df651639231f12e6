"""Marks of writers that were asked to prepare and not undone: a file each in ``/run/ballast/writers/``.

It holds the very request that undoes the writer. Its unit reads it when its process has ended and no agent says
otherwise, and the next agent finds by it what an agent that died has left.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import time
from pathlib import Path
from typing import Any

from ballast.guest.linux.cgroup import kill_all

MARKERS = Path("/run/ballast/writers")
CGROUPS = Path("/sys/fs/cgroup/ballast.slice")

UNDO_S = 30.0  # for guard and systemd to undo what a dead agent left, before it is killed
KILLED_S = 30.0  # and then
_RETRY_S = 0.1


def unit_of(name: str) -> str:
    """The unit of the writer ``name``."""
    return f"ballast-writer-{name}.service"


def write_marker(path: Path, request: dict[str, Any]) -> None:
    """For the writer's own user to read; it holds what the configuration says, no secret. OSError."""
    path.parent.mkdir(exist_ok=True)
    path.parent.chmod(0o711)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "w") as file:
        os.fchmod(file.fileno(), 0o644)
        json.dump(request, file)
        file.write("\n")


def kill(cgroup: Path) -> None:
    """Kill all that a writer has started."""
    with contextlib.suppress(OSError):  # it is gone
        fd = os.open(cgroup / "cgroup.procs", os.O_RDONLY | os.O_CLOEXEC)
        try:
            kill_all(fd)
        finally:
            os.close(fd)


def services_of(markers: Path) -> Path:
    """Where the marks of services are (writer_service.py), beside those of programs."""
    return markers.with_name("services")


def left_in(markers: Path) -> list[Path]:
    """The marks there are."""
    return sorted(markers.iterdir()) if markers.is_dir() else []


async def see_undone(markers: Path = MARKERS, cgroups: Path = CGROUPS) -> list[str]:
    """Wait until every writer that an agent left is undone, and has ended; their names. What hangs is killed."""
    left = left_in(markers)
    waiting = {cgroups / unit_of(marker.name) for marker in left}
    for patience_s in (UNDO_S, KILLED_S):
        deadline_s = time.monotonic() + patience_s
        while waiting and time.monotonic() < deadline_s:
            waiting = {cgroup for cgroup in waiting if cgroup.exists()}
            await asyncio.sleep(_RETRY_S if waiting else 0)
        for cgroup in waiting:
            kill(cgroup)
    for marker in left:
        with contextlib.suppress(OSError):
            marker.unlink()
    return [marker.name for marker in left]
