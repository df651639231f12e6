"""Which programs are writers: docs/writers.md, "Where they are". Looks at files only; may block as a disk does."""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

FOLDERS = (Path("/etc/ballast/writers.d"), Path("/usr/lib/ballast/writers"))  # the first that has a name has it

_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,63}")
_NEEDS = re.compile(rb"^# ballast-needs: *(.+)$", re.MULTILINE)
_PROCESS = "comm="
_COMM_BYTES = 64  # kernel threads have long names
_HEAD_BYTES = 1024
_WORD_BYTES = 1 << 16


def find_writers(folders: Sequence[Path] = FOLDERS) -> list[Path]:
    """The programs, by name; without those that a link to /dev/null switches off. OSError."""
    found: dict[str, Path] = {}
    for folder in reversed(folders):
        if folder.is_dir():
            found |= {file.name: file for file in folder.iterdir() if _NAME.fullmatch(file.name)}
    return [file for _, file in sorted(found.items()) if not file.is_char_device()]


def why_unsafe(program: Path) -> str | None:
    """Why ``program`` must not be run as root: somebody else may write it, or what leads to it. None if it may."""
    try:
        real = program.resolve(strict=True)
        for path in (real, *real.parents):
            status = path.stat()
            # In a sticky folder nobody can replace what is root's.
            is_open = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not status.st_mode & stat.S_ISVTX
            if status.st_uid != 0 or is_open:
                return f"others than root may write {path}"
        if not stat.S_ISREG(real.stat().st_mode) or not real.stat().st_mode & stat.S_IXUSR:
            return f"{real} is no executable file"
    except OSError as error:
        return f"cannot look at {program}: {error.strerror}"
    return None


def what_is_missing(program: Path, config: Mapping[str, Any]) -> str | None:
    """What the line ``# ballast-needs:`` asks for, if none of it is there; None if it may be started. OSError.

    ``config`` is its own table, which it may need as ``[writer.NAME]``.
    """
    with program.open("rb") as file:
        match = _NEEDS.search(file.read(_HEAD_BYTES))
    if match is None:
        return None
    needs = match.group(1).decode(errors="surrogateescape").split()
    if config and f"[writer.{program.name}]" in needs:
        return None
    running = _running() if any(need.startswith(_PROCESS) for need in needs) else set()
    if any(_is_there(need, running) for need in needs):
        return None
    return f"no {' or '.join(need.replace(_PROCESS, 'process ') for need in needs)}"


def _is_there(need: str, running: Collection[str]) -> bool:
    """Whether ``NAME`` runs for ``comm=NAME``, or there is a file for ``PATTERN``, or one without a word. OSError."""
    if need.startswith(_PROCESS):
        return need.removeprefix(_PROCESS) in running
    pattern, _, word = need.partition("!")
    return any(not word or not _contains(file, word) for file in Path("/").glob(pattern.lstrip("/")))


def _running() -> set[str]:
    """Names of all processes: proc_pid_comm(5). Bare system calls, since there are many, and a freeze waits for it."""
    names = set()
    for pid in filter(str.isdigit, os.listdir("/proc")):  # noqa: PTH208
        with contextlib.suppress(OSError):  # it has ended
            fd = os.open(f"/proc/{pid}/comm", os.O_RDONLY | os.O_CLOEXEC)
            try:
                names.add(os.read(fd, _COMM_BYTES).decode(errors="surrogateescape").rstrip("\n"))
            finally:
                os.close(fd)
    return names


def _contains(file: Path, word: str) -> bool:
    """Whether ``word`` is in the beginning of ``file``. OSError."""
    with file.open("rb") as opened:
        return word.encode(errors="surrogateescape") in opened.read(_WORD_BYTES)
