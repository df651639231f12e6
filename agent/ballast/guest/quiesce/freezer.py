"""The guard's threads: one for each file system issues its FIFREEZE and, when released, its FITHAW.

A freeze that returns into a cancelled session is thawed by the same thread at once, with no window between. Stdlib and
kernel only, as all of the guard.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any

from ballast.guest.linux import fsfreeze
from ballast.guest.quiesce import guard_protocol as protocol

FREEZING_GRACE_S = 0.5  # how long to wait for a FIFREEZE that just has not returned yet, before calling it stuck
LEVEL_THAW_S = 1.0  # how long one level's thaw may hold up the next


class Freezer:
    """One file system and the thread that freezes and thaws it.

    States: waiting -> freezing -> frozen -> thawed; "failed" if FIFREEZE said no, "untouched" if it never ran.
    ``errno`` is that of the failed FIFREEZE, or of the FITHAW (EINVAL: somebody else thawed it before).
    """

    def __init__(self, fd: int, changed: Callable[[], None]) -> None:
        self.fd = fd
        self.state = "waiting"
        self.errno = 0
        self.freeze_s = 0.0
        self.go = threading.Event()
        self.release = threading.Event()
        self._changed = changed
        threading.Thread(target=self._run, daemon=True).start()

    @property
    def is_settled(self) -> bool:
        """Whether its FIFREEZE has returned."""
        return self.state not in ("waiting", "freezing")

    @property
    def is_over(self) -> bool:
        """Whether nothing is left to thaw."""
        return self.state in ("thawed", "failed", "untouched")

    def _run(self) -> None:
        self.go.wait()
        if self.release.is_set():
            self.state = "untouched"
        else:
            self._freeze_and_thaw()
        os.close(self.fd)
        self._changed()

    def _freeze_and_thaw(self) -> None:
        self.state = "freezing"
        started_s = protocol.boottime_s()
        try:
            fsfreeze.freeze(self.fd)
        except OSError as error:
            self.errno = error.errno or 0
            self.state = "failed"
            return
        self.freeze_s = protocol.boottime_s() - started_s
        self.state = "frozen"
        self._changed()
        self.release.wait()
        try:
            fsfreeze.thaw(self.fd)
        except OSError as error:
            self.errno = error.errno or 0
        self.state = "thawed"


class Freezes:
    """One session: levels of file systems, frozen first to last and thawed last to first."""

    def __init__(self, levels: list[list[int]], fds: list[int], expires_s: float, changed: Callable[[], None]) -> None:
        if sorted(index for level in levels for index in level) != list(range(len(fds))):
            raise ValueError("levels do not name each descriptor once")
        self.freezers = [Freezer(fd, changed) for fd in fds]
        self.expires_s = expires_s
        self.cause: str | None = None
        self._levels = [[self.freezers[i] for i in level] for level in levels]
        self._to_freeze = list(self._levels)
        self._to_thaw: list[list[Freezer]] = []
        self._level_since_s = 0.0
        self._thawed_at_s = 0.0
        self._told: set[int] = set()
        self._told_frozen = False
        self._told_thawed = False

    @property
    def is_freezing(self) -> bool:
        """Whether a FIFREEZE may still be waited for, or come."""
        return self.cause is None and not self._told_frozen

    @property
    def is_over(self) -> bool:
        """Whether the last word is said and no thread of this session is left."""
        return self._told_thawed and all(freezer.is_over for freezer in self.freezers)

    def cancel(self, cause: str) -> None:
        """Begin to thaw; the first cause stays."""
        if self.cause is None:
            self.cause = cause
            self._to_thaw = list(self._levels)
            self._level_since_s = 0.0

    def advance(self, now_s: float) -> list[dict[str, Any]]:
        """Take the next steps that can be taken, and return what the agent is to be told."""
        messages = self._news()
        if self.cause is None and now_s >= self.expires_s:
            self.cancel("lease")
        if self.cause is None:
            self._freeze_on()
            if not self._to_freeze and not self._told_frozen and all(f.is_settled for f in self.freezers):
                self._told_frozen = True
                messages = [*messages, *self._news(), {"event": "frozen"}]
        else:
            self._thaw_on(now_s)
            if self._is_thawed(now_s) and not self._told_thawed:
                self._told_thawed = True
                messages = [*messages, {"event": "thawed", "cause": self.cause, "filesystems": self._report()}]
        return messages

    def _freeze_on(self) -> None:
        while self._to_freeze:
            level = self._to_freeze[0]
            for freezer in level:
                freezer.go.set()
            if not all(freezer.is_settled for freezer in level):
                return
            self._to_freeze.pop(0)

    def _thaw_on(self, now_s: float) -> None:
        while self._to_thaw:
            level = self._to_thaw[-1]
            for freezer in level:
                freezer.release.set()
                freezer.go.set()
            self._level_since_s = self._level_since_s or now_s
            stuck = [f for f in level if not f.is_over and f.state != "freezing"]
            if stuck and now_s < self._level_since_s + LEVEL_THAW_S:
                return
            self._to_thaw.pop()
            self._level_since_s = 0.0

    def _is_thawed(self, now_s: float) -> bool:
        """Whether all is thawed, or only that is left which has waited for a writer for some time."""
        if self._to_thaw:
            return False
        self._thawed_at_s = self._thawed_at_s or now_s
        waits = all(freezer.is_over or freezer.state == "freezing" for freezer in self.freezers)
        none_left = all(freezer.is_over for freezer in self.freezers)
        return none_left or (waits and now_s >= self._thawed_at_s + FREEZING_GRACE_S)

    def _news(self) -> list[dict[str, Any]]:
        news = []
        for index, freezer in enumerate(self.freezers):
            if freezer.state in ("frozen", "failed") and index not in self._told:
                self._told.add(index)
                news.append({"event": "settled", "index": index} | self._describe(freezer))
        return news

    def _report(self) -> list[dict[str, Any]]:
        return [self._describe(freezer) for freezer in self.freezers]

    @staticmethod
    def _describe(freezer: Freezer) -> dict[str, Any]:
        return {"state": freezer.state, "errno": freezer.errno, "freeze_ms": round(1000 * freezer.freeze_s, 3)}
