"""What the writers for hooks that exist already have in common: they run in order, and are undone in reverse.

Whoever was told to freeze is told once that it is over, also by a writer that was started anew for it:
$RUNTIME_DIRECTORY/hooks.json remembers them. One that failed is told as well, since it may have come half-way; neither
qemu-ga nor open-vm-tools does that.
"""

from __future__ import annotations

import json
import os
import stat
import sys
from collections.abc import Sequence
from pathlib import Path

from ballast.guest.writers.child import BEGIN, SCOPE, Ending, await_stranger, read_start_ticks, run_child
from ballast.guest.writers.program import AbsentError, Request, Writer, WriterError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

# Before and after the databases, in which a hook may write that its application pauses: commits wait there later.
LEVEL = "front-end"
PHASE_MS = 60_000  # to freeze, and to thaw: all hooks together
# What editors, dpkg and rpm leave beside a hook; qemu's fsfreeze-hook passes over the same (QEMU 10.0, and Debian's).
_LEFTOVERS = ("~", ".bak", ".orig", ".rpmnew", ".rpmorig", ".rpmsave", ".sample")
_LEFTOVER_PART = ".dpkg-"
_LEDGER = "hooks.json"
_FREEZE, _UNDO = "freeze", "undo"


class Hook:
    """Somebody's program, what it is called with, and how far it came. All of it is JSON."""

    def __init__(
        self,
        name: str,
        *,
        freeze: Sequence[str] = (),
        thaw: Sequence[str] = (),
        abort: Sequence[str] = (),
        freeze_tries: int = 1,
        thaw_tries: int = 1,
        limit_s: float = 600.0,
        fine: Sequence[int] = (0,),
        is_over: bool = False,
        pid: int = 0,
        start_ticks: int = 0,
    ) -> None:
        """``limit_s`` is for all tries of one command; a command that is empty is not run. ``pid``: it runs now."""
        self.name = name
        self.freeze = freeze
        self.thaw = thaw
        self.abort = abort
        self.freeze_tries = freeze_tries
        self.thaw_tries = thaw_tries
        self.limit_s = limit_s
        self.fine = fine
        self.is_over = is_over
        self.pid = pid
        self.start_ticks = start_ticks


class HookWriter(Writer):
    """Of ``root`` the tests have their own. Hooks go into scopes of their own where systemd runs."""

    def __init__(self, root: Path = Path("/")) -> None:
        self.root = root
        self._has_systemd = (root / "run/systemd/system").is_dir()  # sd_booted(3)
        self._folder = Path(os.environ["RUNTIME_DIRECTORY"])
        self._hooks: list[Hook] = []
        self._asked = self._load()

    def find(self) -> list[Hook]:
        """The hooks in their order. WriterError, OSError."""
        raise NotImplementedError

    def identify(self, request: Request) -> dict[str, Any]:
        """Critical, as they are where they come from. What is wrong with them ``prepare`` says: it can be critical."""
        try:
            is_absent = not self.find()
        except (OSError, WriterError):
            is_absent = False
        if is_absent:
            raise AbsentError("no hooks")
        return {"level": LEVEL, "critical": True, "freeze-ms": PHASE_MS, "thaw-ms": PHASE_MS}

    def prepare(self, request: Request) -> dict[str, Any]:
        """Refuse what others than root may write, before anything is held."""
        self._hooks = self.find()
        programs = dict.fromkeys(command[0] for hook in self._hooks for command in (hook.freeze, hook.thaw) if command)
        refusals = [reason for program in programs if (reason := self.refusal(Path(program)))]
        if refusals:
            raise WriterError("; ".join(refusals))
        return {}

    def freeze(self, request: Request) -> dict[str, Any]:
        """Run all, until one fails; the agent's ``abort`` follows then."""
        for hook in self._hooks:
            self._asked.append(hook)
            self._save()
            failure = self._run(hook, _FREEZE, hook.freeze, request.left_s())
            if failure:
                raise WriterError(failure)
        return {"detail": {"hooks": [hook.name for hook in self._hooks]}}

    def thaw(self, request: Request) -> dict[str, Any]:
        """A hook that fails here may tell that what it held was lost: its backup fails elsewhere too."""
        failures = self._undo(request)
        return {"held": False, "reason": "; ".join(failures)} if failures else {"held": True}

    def abort(self, request: Request) -> dict[str, Any]:
        """The same for a freeze that failed."""
        failures = self._undo(request)
        if failures:
            raise WriterError("; ".join(failures))
        return {}

    def refusal(self, program: Path) -> str | None:
        """Why ``program`` is not run, or None."""
        refused = why_refused(program, self.root)
        return refused or (None if os.access(program, os.X_OK) else f"{program} is not executable")

    def _undo(self, request: Request) -> list[str]:
        """In reverse order, each with its share of the time, so that one that hangs leaves some to the others."""
        failures = []
        pending = [hook for hook in self._asked if not hook.is_over]
        while pending:
            share_s = request.left_s() / len(pending)
            hook = pending.pop()
            if hook.pid:
                await_stranger(hook.pid, hook.start_ticks, share_s)
                share_s = request.left_s() / (len(pending) + 1)
            if not self._begun(hook, _UNDO).exists():
                failure = self._run(hook, _UNDO, hook.thaw if request.verb == "thaw" else hook.abort, share_s)
                failures += [failure] if failure else []
            hook.is_over = True
            self._save()
        return failures

    def _run(self, hook: Hook, step: str, command: Sequence[str], timeout_s: float) -> str | None:
        """Which program failed, and how its last try did; or None."""
        if not command:
            return None
        left_s = min(timeout_s, hook.limit_s)
        failure = None
        for _ in range(hook.freeze_tries if step == _FREEZE else hook.thaw_tries):
            note(f"running {command[0]}")  # not its arguments: Azure's may hold a password
            ending = self._run_once(hook, step, command, left_s)
            left_s -= ending.spent_s
            failure = ending.failure(hook.fine)
            if failure is None or ending.status is None:
                break
        return f"{command[0]} {failure}" if failure else None

    def _run_once(self, hook: Hook, step: str, command: Sequence[str], timeout_s: float) -> Ending:
        def remember(pid: int) -> None:
            hook.pid, hook.start_ticks = pid, read_start_ticks(pid)
            self._save()

        begun = self._begun(hook, step)
        command = [*BEGIN, str(begun), *command]
        scope = [*SCOPE, f"--description=Ballast hook {hook.name}", "--"] if self._has_systemd else []
        ending = run_child([*scope, *command], timeout_s, started=remember)
        if scope and ending.status is not None and not begun.exists():
            note("systemd makes no scope for it, as in a shutdown")
            ending = run_child(command, timeout_s - ending.spent_s, started=remember)
        hook.pid = 0
        self._save()
        return ending

    def _begun(self, hook: Hook, step: str) -> Path:
        """The file that is there when a program of ``hook`` has been begun, in whichever process of ours."""
        return self._folder / f"{self._asked.index(hook)}-{step}"

    def _load(self) -> list[Hook]:
        try:
            return [Hook(**fields) for fields in json.loads((self._folder / _LEDGER).read_text())]
        except FileNotFoundError:
            return []

    def _save(self) -> None:
        save_whole(self._folder / _LEDGER, json.dumps([vars(hook) for hook in self._asked]))


def is_leftover(name: str) -> bool:
    """Whether a file of this name is no hook, but what was left of one."""
    return name.endswith(_LEFTOVERS) or _LEFTOVER_PART in name


def note(line: str) -> None:
    """A line for the journal."""
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


def save_whole(file: Path, text: str) -> None:
    """Write all of it or nothing, whenever this process is killed, for nobody else to read."""
    draft = file.with_suffix(".new")
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "w") as opened:
        opened.write(text)
    draft.replace(file)


def why_refused(file: Path, root: Path) -> str | None:
    """Why it is not used: others than root, or than who runs us, may write it or a folder that leads to it."""
    try:
        real = file.resolve(strict=True)
        for place in (real, *real.parents):
            if place == root:
                break
            status = place.stat()
            if status.st_uid not in (0, os.geteuid()) or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                return f"{file} is not used: others than root may write {place}"
    except OSError as error:
        return f"{file} is not used: {error.strerror}"
    return None
