"""What any writer is, program or service on the bus: an application that is asked, in order, to take part in a freeze.

docs/writers.md is the page for who writes one; here is what the agent expects of either kind.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

from ballast.wire.errors import BadRequest
from ballast.wire.shape import read_record

Level = Literal["front-end", "back-end", "system"]
LEVELS: tuple[Level, ...] = get_args(Level)  # in the order of freezing
Verb = Literal["prepare", "freeze", "thaw", "post", "abort"]

ANSWER_LIMIT_BYTES = 1 << 16
_PHASE_MAX_MS = 600_000


@dataclass(frozen=True, slots=True)
class Description:
    """Who a writer is, in its own words: what it answers ``identify`` with."""

    level: Level = "back-end"
    critical: bool = False
    user: str = "root"
    prepare_ms: int = 30_000
    freeze_ms: int = 10_000
    thaw_ms: int = 10_000
    absent: str | None = None


# What the administrator's table ``[writer.NAME]`` may say instead; the rest of it is the writer's own affair.
OVERRIDABLE = frozenset({"level", "critical", "user", "prepare-ms", "freeze-ms", "thaw-ms"})


class WriterFailed(Exception):
    """It said no, or nothing that can be understood. ``retryable``: it may say yes in a moment."""

    def __init__(self, reason: str, *, retryable: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.retryable = retryable


class WriterTimedOut(WriterFailed):
    """It did not answer in time; what it does from now on nobody knows."""


class WriterEnded(WriterFailed):
    """It is gone: killed, crashed, or off the bus."""


class Writer(Protocol):
    """One of them. Used for one session, by one task at a time."""

    name: str

    async def start(self, session_id: str, config: dict[str, Any], *, timeout_s: float) -> Description:
        """Begin, and hear who it is: ``absent`` says why there is nothing to do. WriterFailed and its kinds."""

    async def ask(self, verb: Verb, *, timeout_s: float, **arguments: Any) -> dict[str, Any]:
        """Tell it to do something, and hear how that went: a JSON object. WriterFailed and its kinds.

        A call that is cancelled leaves it as after WriterTimedOut.
        """

    def lifeline(self) -> tuple[int, int] | None:
        """Descriptors by which the guard has it undone when the agent dies: a socket to hang up, a cgroup.procs.

        They stay the writer's own. None if it needs no such thing. After ``start``.
        """

    async def force_abort(self, *, timeout_s: float) -> None:
        """It timed out or ended and was prepared: have it undone without its help. WriterFailed if that fails.

        Returns when nothing of it is at work any more.
        """

    def close(self) -> None:
        """It was undone, or never prepared: let go of it. Never waits."""


def read_answer(line: bytes) -> dict[str, Any]:
    """An answer as it stands on the wire; WriterFailed if it tells of an error, or is none."""
    try:
        answer = json.loads(line)
    except ValueError as error:
        raise WriterFailed(f"answered what is no JSON: {line[:80]!r}") from error
    if not isinstance(answer, dict):
        raise WriterFailed(f"answered what is no JSON object: {line[:80]!r}")
    if "error" in answer:
        raise WriterFailed(str(answer["error"])[:1000], retryable=answer.get("retryable") is True)
    return answer


def read_description(answer: dict[str, Any], config: dict[str, Any]) -> Description:
    """What ``identify`` was answered with, checked; ``config`` may say otherwise. WriterFailed names the field."""
    overrides = {key: value for key, value in config.items() if key in OVERRIDABLE}
    try:
        description = read_record(Description, answer | overrides)
    except BadRequest as error:
        raise WriterFailed(f"identify: {error.desc}") from error
    if description.level not in LEVELS:
        raise WriterFailed(f"identify: level is one of {', '.join(LEVELS)}, not {description.level!r}")
    for name in ("prepare_ms", "freeze_ms", "thaw_ms"):
        if not 0 < getattr(description, name) <= _PHASE_MAX_MS:
            raise WriterFailed(f"identify: {name.replace('_', '-')} is 1 to {_PHASE_MAX_MS}")
    return description
