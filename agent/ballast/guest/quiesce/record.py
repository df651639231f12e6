"""What must outlive the agent: ``/run/ballast/quiesce.json``.

It names what is being frozen from before the first ioctl, for whoever has to clean up, and keeps the answers of ended
sessions for an hour. On a tmpfs, so that writing it never waits for a frozen disk.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

PATH = Path("/run/ballast/quiesce.json")
ANSWERS_KEPT_S = 3600.0
_ANSWERS_KEPT = 64


@dataclass(slots=True)
class Open:
    """The session that is, or was, being held: what to thaw, and which process froze it."""

    id: str
    guard_pid: int
    guard_start: str
    filesystems: list[dict[str, Any]]


@dataclass(slots=True)
class Record:
    """``answers``: {id: {"at_s": boot time, "ended": the reply, "unreported": bool}}."""

    open: Open | None = None
    answers: dict[str, dict[str, Any]] = field(default_factory=dict)

    def remember(self, session_id: str, ended: dict[str, Any], *, now_s: float, unreported: bool) -> None:
        """Keep the answer of a session; old ones go."""
        self.answers[session_id] = {"at_s": now_s, "ended": ended, "unreported": unreported}
        fresh = {key: value for key, value in self.answers.items() if now_s - value["at_s"] < ANSWERS_KEPT_S}
        self.answers = dict(list(fresh.items())[-_ANSWERS_KEPT:])


def read_record(path: Path) -> Record:
    """Read it; an absent file is an empty record. ValueError if it cannot be understood, OSError."""
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        return Record()
    try:
        opened = content["open"]
        return Record(Open(**opened) if opened else None, content["answers"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a record of ours") from error


def write_record(path: Path, record: Record) -> None:
    """Replace the file in one step."""
    fresh = path.with_suffix(".new")
    with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "w") as file:
        json.dump({"open": asdict(record.open) if record.open else None, "answers": record.answers}, file)
    fresh.replace(path)


def process_start(pid: int) -> str:
    """A process's start time in clock ticks: with the pid it names one process for ever (proc_pid_stat(5)).

    ProcessLookupError if it is gone. One that has died but has a thread left, stuck in the kernel, is not gone.
    """
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except FileNotFoundError as error:
        raise ProcessLookupError(pid) from error
    threads, start = int(fields[16]), fields[18]
    if state == "Z" and threads <= 1:
        raise ProcessLookupError(pid)
    return start
