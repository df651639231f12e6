"""Units of systemd to stop, or to send a signal to, for the time of a freeze: ``[writer.units]`` says which.

    stop = ["app.service"]
    signal = {"queue.service" = "SIGUSR1/SIGUSR2"}

What runs of it is stopped, and with it what systemd stops along with it; that is started again, and nothing else. A
signal goes to the main process, the second one only while it is still the same: another it might kill. Whether a unit
heeds a signal nobody can tell. systemctl(1), systemd.unit(5); PID 1 is asked only while nothing is frozen.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterable
from pathlib import Path

from ballast.guest.writers.child import run_child
from ballast.guest.writers.hooks import LEVEL, save_whole
from ballast.guest.writers.program import AbsentError, Request, Writer, WriterError, run

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

SYSTEMCTL = Path("/usr/bin/systemctl")
PHASE_MS = 100_000  # systemd gives a unit 90 s to stop, and as long to start
# What a stop takes along: the reverse of Requires=, BindsTo=, PartOf= and StopPropagatedFrom=.
_TAKES_ALONG = ("RequiredBy", "BoundBy", "ConsistsOf", "PropagatesStopTo")
_PROPERTIES = ("Id", "LoadState", "ActiveState", "InvocationID", *_TAKES_ALONG)
_RUNNING = ("active", "activating", "reloading", "refreshing")
_AT_REST = ("inactive", "failed")
_OURS = "ballast-"


class Units(Writer):
    """$RUNTIME_DIRECTORY/units.json remembers what was done, from before it is done, until it is undone."""

    def __init__(self, systemctl: Path = SYSTEMCTL) -> None:
        self._systemctl = systemctl
        self._stop: list[str] = []
        self._signal: dict[str, str] = {}
        self._file = Path(os.environ["RUNTIME_DIRECTORY"]) / "units.json"
        self._stopped: list[str] = []
        self._signalled: dict[str, list[str]] = {}  # unit -> its invocation, and the signal at the end
        if self._file.exists():
            self._stopped, self._signalled = json.loads(self._file.read_text())

    def identify(self, request: Request) -> dict[str, Any]:
        """What is wrong with the configuration ``prepare`` says, for it may be critical."""
        self._stop = request.config.get("stop", [])
        self._signal = request.config.get("signal", {})
        if not self._stop and not self._signal:
            raise AbsentError("[writer.units] names no units")
        return {"level": LEVEL, "freeze-ms": PHASE_MS, "thaw-ms": PHASE_MS}

    def prepare(self, request: Request) -> dict[str, Any]:
        """See that all units are there, and that we would not stop ourselves."""
        check_config(self._stop, self._signal)
        self._show([*self._stop, *self._signal], request)
        self._plan(request)
        return {}

    def freeze(self, request: Request) -> dict[str, Any]:
        """Stop first, and signal what is left; what does not run is left alone."""
        self._stopped = self._plan(request)
        self._save()
        if self._stopped:
            self._systemctl_to("stop", self._stopped, request)
            for name, unit in self._show(self._stopped, request).items():
                if unit["ActiveState"] not in _AT_REST:
                    raise WriterError(f"{name} is {unit['ActiveState']} after its stop")
        for name, unit in self._show(self._signal, request).items():
            if unit["ActiveState"] in _RUNNING:
                first, _, last = self._signal[unit["name"]].partition("/")
                self._signalled[name] = [unit["InvocationID"], last]
                self._save()
                self._kill(name, first, request)
        return {"detail": {"stopped": self._stopped, "signalled": list(self._signalled)}}

    def thaw(self, request: Request) -> dict[str, Any]:
        """It held if what was stopped stayed so, and what was signalled is the same still."""
        lost = self._why_lost(request)
        reasons = lost + self._undo(request)
        answer: dict[str, Any] = {"held": not lost}
        return answer | {"reason": "; ".join(reasons)} if reasons else answer

    def abort(self, request: Request) -> dict[str, Any]:
        """The same, also for what an earlier process of ours did."""
        failures = self._undo(request)
        if failures:
            raise WriterError("; ".join(failures))
        return {}

    def _plan(self, request: Request) -> list[str]:
        """What a stop will stop, of what runs. WriterError if that is us."""
        running: list[str] = []
        names: Iterable[str] = self._stop
        seen: set[str] = set()
        while names:
            units = self._show(names, request)
            seen.update(names, units)
            active = {name: unit for name, unit in units.items() if unit["ActiveState"] in _RUNNING}
            running += [name for name in active if name not in running]
            taken = {name for unit in active.values() for key in _TAKES_ALONG for name in unit.get(key, "").split()}
            names = sorted(taken - seen)
        if ours := [name for name in running if name.startswith(_OURS)]:
            raise WriterError(f"this would stop {', '.join(ours)}")
        return running

    def _why_lost(self, request: Request) -> list[str]:
        stopped, signalled = self._show(self._stopped, request), self._show(self._signalled, request)
        started = [f"{name} was started" for name, unit in stopped.items() if unit["ActiveState"] in _RUNNING]
        changed = [
            f"{name} ended or was restarted" for name, unit in signalled.items() if not self._is_same(name, unit)
        ]
        return started + changed

    def _undo(self, request: Request) -> list[str]:
        """In reverse order. Remembered until it is done: twice is better than not at all, if we are killed in it."""
        failures = []
        try:
            for name, unit in reversed(self._show(self._signalled, request).items()):
                last = self._signalled[name][1]
                if last and self._is_same(name, unit):
                    self._kill(name, last, request)
        except WriterError as error:
            failures.append(str(error))
        self._signalled = {}
        self._save()
        try:
            if self._stopped:
                self._systemctl_to("start", self._stopped, request)
        except WriterError as error:
            failures.append(str(error))
        self._stopped = []
        self._save()
        return failures

    def _is_same(self, name: str, unit: dict[str, str]) -> bool:
        return unit["ActiveState"] in _RUNNING and unit["InvocationID"] == self._signalled[name][0]

    def _kill(self, name: str, signal_name: str, request: Request) -> None:
        self._systemctl_to("kill", [name], request, "--kill-whom=main", f"--signal={signal_name}")

    def _show(self, names: Iterable[str], request: Request) -> dict[str, dict[str, str]]:
        """The units' properties by their true names; ``name`` is what we call it. WriterError if one is not there."""
        asked = list(names)
        if not asked:
            return {}
        text = self._systemctl_to("show", asked, request, f"--property={','.join(_PROPERTIES)}")
        units = {}
        for name, block in zip(asked, text.strip().split("\n\n"), strict=True):
            unit = dict(line.split("=", 1) for line in block.splitlines() if "=" in line)
            if unit["LoadState"] not in ("loaded", "masked"):
                raise WriterError(f"{name} is {unit['LoadState']}")
            units[unit["Id"]] = unit | {"name": name}
        return units

    def _systemctl_to(self, verb: str, names: list[str], request: Request, *options: str) -> str:
        command = [str(self._systemctl), "--no-ask-password", verb, *options, "--", *names]
        ending = run_child(command, request.left_s(), quiet=verb == "show")
        if failure := ending.failure():
            raise WriterError(f"systemctl {verb} {' '.join(names)} {failure}")
        return ending.output.decode(errors="replace")

    def _save(self) -> None:
        save_whole(self._file, json.dumps([self._stopped, self._signalled]))


def check_config(stop: object, signals: object) -> None:
    """WriterError says what is wrong with ``[writer.units]``."""
    if not isinstance(stop, list) or not all(isinstance(name, str) for name in stop):
        raise WriterError("stop is a list of units")
    if not isinstance(signals, dict):
        raise WriterError('signal is a table: {"queue.service" = "SIGUSR1/SIGUSR2"}')
    for name, value in signals.items():
        words = value.split("/") if isinstance(value, str) else []
        if not 1 <= len(words) <= 2 or any(word not in signal.Signals.__members__ for word in words):
            raise WriterError(f"signal for {name} is one or two names, like SIGUSR1/SIGUSR2, and not {value!r}")


def main() -> int:
    """The program /usr/lib/ballast/writers/units."""
    return run(Units())
