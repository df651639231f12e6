"""What became of each file system of a session, told by the guard or by the net: bookkeeping without any waiting."""

from __future__ import annotations

import errno
import os
from dataclasses import replace
from typing import Any

from ballast.guest.quiesce.forecast import FileSystem, Plan
from ballast.wire.names import EndReason, FilesystemResult


class Outcome:
    """One result for each file system of a plan, in the plan's order; ``skipped`` never change."""

    def __init__(self, plan: Plan) -> None:
        self._results = [_result(filesystem, "freezing") for filesystem in plan.filesystems]
        self._skipped = [_result(s.filesystem, "skipped", s.reason) for s in plan.skipped]

    @property
    def filesystems(self) -> list[FilesystemResult]:
        """All, with those that the plan leaves out."""
        return [*self._results, *self._skipped]

    @property
    def skipped(self) -> list[FilesystemResult]:
        """Those that the plan leaves out, with the reason."""
        return list(self._skipped)

    def in_state(self, state: str) -> list[FilesystemResult]:
        """Those in one state."""
        return [result for result in self._results if result.state == state]

    @property
    def is_whole(self) -> bool:
        """Whether something is frozen, and everything that can be."""
        return bool(self.in_state("frozen")) and not self.in_state("failed") and not self.in_state("freezing")

    def settle(self, said: dict[str, Any]) -> None:
        """Take in the guard's word that one FIFREEZE returned."""
        state, reason = said["state"], None
        if state == "failed":
            state = "skipped" if said["errno"] == errno.EOPNOTSUPP else "failed"
            reason = _freeze_error(said["errno"])
        index = said["index"]
        self._results[index] = replace(self._results[index], state=state, reason=reason, freeze_ms=said["freeze_ms"])

    def thawed_by_guard(self, said: list[dict[str, Any]]) -> bool:
        """Take in the guard's last word; True if somebody else had thawed one of them before."""
        broken = False
        for index, one in enumerate(said):
            if one["state"] in ("freezing", "untouched"):
                state: Any = "freezing" if one["state"] == "freezing" else "thawed"
                self._results[index] = replace(self._results[index], state=state)
            elif one["state"] == "thawed" and one["errno"] in (0, errno.EINVAL):
                self._results[index] = replace(self._results[index], state="thawed")
                broken = broken or one["errno"] == errno.EINVAL
            elif one["state"] == "thawed":
                reason = f"cannot be thawed: {os.strerror(one['errno'])}"
                self._results[index] = replace(self._results[index], state="frozen", reason=reason)
        return broken

    def all_thawed(self) -> None:
        """Nothing is frozen or freezing any more."""
        self._results = [
            replace(result, state="thawed") if result.state in ("frozen", "freezing") else result
            for result in self._results
        ]


def end_reason(final: dict[str, Any], *, broken: bool, expired: bool, ender: EndReason | None) -> EndReason | None:
    """Why a session did not hold; None if it did. ``final`` is the message that ended it."""
    if final["event"] == "net":
        return "lease-expired" if expired else "guard-lost"
    if final["cause"] == "lease":
        return "lease-expired"
    if final["cause"] != "thaw":
        return "guard-lost"
    return ender or ("thawed-by-stranger" if broken else None)


def _result(filesystem: FileSystem, state: Any, reason: str | None = None) -> FilesystemResult:
    return FilesystemResult(filesystem.mountpoint, filesystem.source, filesystem.type, state, reason)


def _freeze_error(number: int) -> str:
    if number == errno.EBUSY:
        return "somebody else has frozen it already"
    if number == errno.EOPNOTSUPP:
        return "this type cannot be frozen"
    return os.strerror(number)
