"""All writers of one session: asked level by level, undone in the reverse order, each exactly once."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from typing import Any

from ballast.guest.quiesce.writer import (
    LEVELS,
    Description,
    Verb,
    Writer,
    WriterEnded,
    WriterFailed,
    WriterTimedOut,
)
from ballast.guest.threads import in_thread
from ballast.wire.names import WriterResult

log = logging.getLogger(__name__)

_TRIES = 3
_RETRY_S = 0.2
_START_S = 15.0  # one that hangs when asked who it is takes no time of the others
_POST_S = 5.0
_FIND_S = 5.0

Configs = Mapping[str, Mapping[str, Any]]
Finder = Callable[[], Iterable[Writer]]


class Member:
    """One writer of a session: what it said of itself, and how far it came."""

    def __init__(self, writer: Writer) -> None:
        self.writer = writer
        self.description = Description()
        self.is_prepared = False  # it was sent ``prepare``, and neither ``thaw`` nor ``abort``
        self.is_frozen = False
        self.state: Any = "absent"
        self.reason: str | None = None
        self.detail: dict[str, str] | None = None
        self.spent_s = 0.0

    @property
    def is_willing(self) -> bool:
        """Whether nothing has gone wrong with it, and it is there."""
        return bool(self.state == "frozen")

    async def attempt(self, step: Awaitable[None]) -> None:
        """Await a step of it; if that fails, so has the writer."""
        started_s = time.monotonic()
        try:
            await step
        except WriterFailed as error:
            self.state = "timed-out" if isinstance(error, WriterTimedOut) else "failed"
            self.reason = error.reason
            log.warning("writer %s: %s", self.writer.name, error.reason)
        finally:
            self.spent_s += time.monotonic() - started_s

    def undone(self, verb: Verb, answer: dict[str, Any], trouble: WriterFailed | None) -> None:
        """Take in how ``thaw`` or ``abort`` went."""
        if trouble is not None:
            log.warning("writer %s, asked to %s: %s", self.writer.name, verb, trouble.reason)
        if not self.is_willing:
            return
        if verb == "abort":
            self.state = "aborted"
        elif trouble is None and answer.get("held", True) is True:
            self.state = "thawed"
            self.reason = str(answer["reason"])[:1000] if "reason" in answer else None
        else:
            self.state = "lost"
            self.reason = trouble.reason if trouble else str(answer.get("reason", "it says so"))[:1000]

    def result(self) -> WriterResult:
        """As the host hears of it."""
        return WriterResult(
            self.writer.name,
            self.state,
            self.reason,
            round(1000 * self.spent_s, 3),
            self.description.critical,
            self.detail,
        )


class Writers:
    """``find`` says which there are, and may block; ``timeout_s`` bounds what they take until all are frozen."""

    def __init__(self, find: Finder, configs: Configs, session_id: str, *, timeout_s: float) -> None:
        self._find = find
        self._configs = configs
        self._session_id = session_id
        self._members: list[Member] = []
        self._timeout_s = timeout_s
        self._deadline_s = 0.0

    @property
    def results(self) -> list[WriterResult]:
        """One for each."""
        return [member.result() for member in self._members]

    @property
    def are_present(self) -> bool:
        """Whether any has something to do."""
        return any(member.is_willing for member in self._members)

    @property
    def are_consistent(self) -> bool:
        """Whether there are any, and each has frozen its application."""
        return self.are_present and all(m.is_frozen or m.state == "absent" for m in self._members)

    @property
    def obstacles(self) -> list[WriterResult]:
        """The critical ones that failed: reason enough for no freeze at all."""
        return [m.result() for m in self._members if m.description.critical and m.state in ("failed", "timed-out")]

    @property
    def lost(self) -> list[WriterResult]:
        """Those that had frozen and did not hold until the end."""
        return [m.result() for m in self._members if m.state == "lost"]

    async def start(self) -> None:
        """Start all, side by side, and hear who is there. Never raises, as the others: see ``results``."""
        self._deadline_s = time.monotonic() + self._timeout_s
        try:
            async with asyncio.timeout(_FIND_S):
                found = await in_thread(self._find, name="quiesce-writers")
        except (OSError, TimeoutError) as error:
            log.warning("cannot look for writers, going on without: %s", str(error) or "a disk does not answer")
            return
        enabled = (writer for writer in found if self._configs.get(writer.name, {}).get("enabled", True))
        self._members = [Member(writer) for writer in enabled]
        await _all(self._start(member) for member in self._members)
        self._members.sort(key=lambda member: (LEVELS.index(member.description.level), member.writer.name))

    def lifelines(self) -> list[tuple[int, int]]:
        """What the guard needs to undo them without us, in the order in which they will be frozen."""
        lines = (member.writer.lifeline() for member in self._members if member.is_willing)
        return [line for line in lines if line is not None]

    async def prepare(self, mountpoints: Sequence[str], lease_ms: int) -> None:
        """Ask all to prepare, side by side. A writer that fails is undone at once."""
        arguments = {"mountpoints": list(mountpoints), "lease-ms": lease_ms}
        await _all(self._ask_to(m, "prepare", m.description.prepare_ms, arguments) for m in self._willing())

    async def freeze(self) -> None:
        """Ask the front ends to hold, then the back ends, then the systems. A writer that fails is undone at once."""
        for level in LEVELS:
            members = [member for member in self._willing() if member.description.level == level]
            await _all(self._ask_to(member, "freeze", member.description.freeze_ms, {}) for member in members)

    async def undo(self, verb: Verb, **arguments: Any) -> None:
        """Tell ``thaw`` or ``abort`` to each that was prepared and not undone, systems first. May be repeated."""
        for level in reversed(LEVELS):
            members = [m for m in self._members if m.is_prepared and m.description.level == level]
            await _all(self._undo(member, verb, arguments) for member in members)

    async def leave(self, *, held: bool | None) -> None:
        """Let go of all; those that thawed are told first whether it ``held``."""
        if held is not None:
            thawed = [member for member in self._members if member.state in ("thawed", "lost")]
            await _all(self._tell_post(member, held) for member in thawed)
        for member in self._members:
            member.writer.close()

    def _willing(self) -> list[Member]:
        return [member for member in self._members if member.is_willing]

    async def _start(self, member: Member) -> None:
        config = dict(self._configs.get(member.writer.name, {}))

        async def start() -> None:
            member.description = await member.writer.start(
                self._session_id, config, timeout_s=min(_START_S, self._left_s())
            )
            member.reason = member.description.absent
            member.state = "absent" if member.reason is not None else "frozen"

        await member.attempt(start())

    async def _ask_to(self, member: Member, verb: Verb, phase_ms: int, arguments: dict[str, Any]) -> None:
        async def ask() -> None:
            member.is_prepared = True
            answer = await self._ask_patiently(member.writer, verb, phase_ms / 1000, arguments)
            member.is_frozen = verb == "freeze"
            member.detail = _read_detail(answer) or member.detail

        await member.attempt(ask())
        if not member.is_willing:
            await self._undo(member, "abort", {"reason": member.reason})

    async def _ask_patiently(
        self, writer: Writer, verb: Verb, phase_s: float, arguments: dict[str, Any]
    ) -> dict[str, Any]:
        """Ask; and again, if the answer is that this might help."""
        deadline_s = time.monotonic() + min(phase_s, self._left_s())
        for try_ in range(1, _TRIES + 1):
            try:
                return await writer.ask(verb, timeout_s=max(0.0, deadline_s - time.monotonic()), **arguments)
            except WriterFailed as error:
                if not error.retryable or try_ == _TRIES or time.monotonic() + _RETRY_S >= deadline_s:
                    raise
            await asyncio.sleep(_RETRY_S)
        raise AssertionError  # the last try returns or raises

    async def _undo(self, member: Member, verb: Verb, arguments: dict[str, Any]) -> None:
        """Tell it, once; what it cannot be told is done without it."""
        timeout_s = member.description.thaw_ms / 1000
        member.is_prepared = False
        answer: dict[str, Any] = {}
        trouble: WriterFailed | None = None
        try:
            if member.state == "timed-out":
                await member.writer.force_abort(timeout_s=timeout_s)
            else:
                answer = await member.writer.ask(verb, timeout_s=timeout_s, **arguments)
        except (WriterTimedOut, WriterEnded) as error:
            trouble = error
            await self._force(member, timeout_s)
        except WriterFailed as error:
            trouble = error
        member.undone(verb, answer, trouble)

    async def _force(self, member: Member, timeout_s: float) -> None:
        try:
            await member.writer.force_abort(timeout_s=timeout_s)
        except WriterFailed as error:
            log.error("writer %s may not be undone: %s", member.writer.name, error.reason)  # noqa: TRY400

    async def _tell_post(self, member: Member, held: bool) -> None:
        with contextlib.suppress(WriterFailed):  # it is over for the host: nobody is there to be told
            await member.writer.ask("post", timeout_s=_POST_S, held=held)

    def _left_s(self) -> float:
        return max(0.0, self._deadline_s - time.monotonic())


def _read_detail(answer: dict[str, Any]) -> dict[str, str] | None:
    detail = answer.get("detail")
    if not isinstance(detail, dict):
        return None
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in detail.items()}


async def _all(steps: Iterable[Coroutine[Any, Any, None]]) -> None:
    async with asyncio.TaskGroup() as group:
        for step in steps:
            group.create_task(step)
