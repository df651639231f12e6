"""The scripts of Azure's VM backup: ``/etc/azure/VMSnapshotScriptPluginConfig.json`` names one before and one after.

As github.com/MicrosoftAzureBackup/VMSnapshotPluginConfig describes it and azure-linux-extensions checks it
(VMBackup/main/ScriptRunner.py): the file is root's with mode 600, the scripts root's with 700. Two things differ: its
first line says what runs a script, not always sh, and ``fsFreezeEnabled`` is the host's affair here.
"""

from __future__ import annotations

import json
from pathlib import Path

from ballast.guest.writers.hooks import Hook, HookWriter, note, why_refused
from ballast.guest.writers.program import MARGIN, AbsentError, Request, WriterError, run

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

_CONFIG = "etc/azure/VMSnapshotScriptPluginConfig.json"
_TIMEOUT_S = 30  # for all tries of one script
_TIMEOUT_MAX_S = 500
_RETRIES_MAX = 100
_FINE = (0, 2)  # CommonVariables: PrePost_ScriptStatus_Success and _Warning
_OTHERS = 0o077


class Settings:
    """The file, checked."""

    def __init__(self, fields: dict[str, Any]) -> None:
        """WriterError names the key that is wrong."""
        self.may_go_on: bool = _value(fields, "continueBackupOnFailure", True)
        self.is_freeze_wanted: bool = _value(fields, "fsFreezeEnabled", True)
        self.timeout_s: int = max(1, min(_value(fields, "timeoutInSeconds", _TIMEOUT_S), _TIMEOUT_MAX_S))
        self.before = _command(fields, "pre")
        self.after = _command(fields, "post")
        self.before_tries = _tries(fields, "pre")
        self.after_tries = _tries(fields, "post")


class AzureScripts(HookWriter):
    """Critical unless ``continueBackupOnFailure``, which is the default."""

    def __init__(self, root: Path = Path("/")) -> None:
        super().__init__(root)
        self._config = root / _CONFIG
        self._may_go_on = True

    def find(self) -> list[Hook]:
        """See ``HookWriter``."""
        settings = self._read_settings()
        if not settings.before and not settings.after:
            return []
        if not settings.before or not settings.after:
            raise WriterError(f"{self._config} names only one of preScriptLocation and postScriptLocation")
        return [
            Hook(
                settings.before[0],
                freeze=self._placed(settings.before),
                thaw=self._placed(settings.after),
                abort=self._placed(settings.after),
                freeze_tries=settings.before_tries,
                thaw_tries=settings.after_tries,
                limit_s=settings.timeout_s,
                fine=_FINE,
            )
        ]

    def identify(self, request: Request) -> dict[str, Any]:
        """As long as the scripts may take."""
        if not self._config.exists():
            raise AbsentError(f"no {self._config}")
        answer = super().identify(request)
        try:
            settings = self._read_settings()
        except (OSError, WriterError):
            return answer | {"critical": False}  # it says nothing else
        self._may_go_on = settings.may_go_on
        phase_ms = round(1000 * settings.timeout_s / (1 - MARGIN)) + 1
        return answer | {"critical": not settings.may_go_on, "freeze-ms": phase_ms, "thaw-ms": phase_ms}

    def prepare(self, request: Request) -> dict[str, Any]:
        """Refuse also what others may read, as Azure does: there may be passwords in it."""
        refused = why_refused(self._config, self.root) or _why_not_private(self._config, "600")
        if refused:
            raise WriterError(refused)
        if not self._read_settings().is_freeze_wanted:
            note(f"{self._config}: fsFreezeEnabled is the host's affair here, ignoring")
        return super().prepare(request)

    def thaw(self, request: Request) -> dict[str, Any]:
        """A backup that goes on whatever the scripts do is not lost by one either."""
        answer = super().thaw(request)
        return answer | {"held": True} if self._may_go_on else answer

    def refusal(self, program: Path) -> str | None:
        """See ``HookWriter``."""
        return super().refusal(program) or _why_not_private(program, "700")

    def _placed(self, command: Sequence[str]) -> list[str]:
        return [str(self.root / command[0].lstrip("/")), *command[1:]]

    def _read_settings(self) -> Settings:
        """WriterError, OSError."""
        try:
            fields = json.loads(self._config.read_text())
        except ValueError as error:
            raise WriterError(f"{self._config}: {error}") from error
        if not isinstance(fields, dict):
            raise WriterError(f"{self._config} holds no JSON object")
        return Settings(fields)


def _command(fields: dict[str, Any], when: str) -> list[str]:
    program: str = _value(fields, f"{when}ScriptLocation", "")
    params: list[Any] = _value(fields, f"{when}ScriptParams", [])
    if program and not Path(program).is_absolute():
        raise WriterError(f"{when}ScriptLocation is no absolute path: {program}")
    return [program, *map(str, params)] if program else []


def _tries(fields: dict[str, Any], when: str) -> int:
    retries: int = _value(fields, f"{when}ScriptNoOfRetries", 0)
    return 1 + max(0, min(retries, _RETRIES_MAX))


def _value(fields: dict[str, Any], key: str, default: Any) -> Any:
    value = fields.get(key, default)
    if type(value) is not type(default):
        raise WriterError(f"{_CONFIG}: {key} is {json.dumps(value)}, and not like {json.dumps(default)}")
    return value


def _why_not_private(file: Path, mode: str) -> str | None:
    if file.stat().st_mode & _OTHERS:
        return f"{file} is not used: others than its owner may read or run it, its mode is to be {mode}"
    return None


def main() -> int:
    """The program /usr/lib/ballast/writers/azure-scripts."""
    return run(AzureScripts())
