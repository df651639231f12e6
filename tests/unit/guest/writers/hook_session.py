"""A writer for hooks as the agent runs it: a process of its own, requests and answers; the guest is a folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from types import TracebackType
from typing import Any

_PROGRAM = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import importlib
from ballast.guest.writers.program import run
module, name = sys.argv[2].split(":")
sys.exit(run(getattr(importlib.import_module(module), name)(Path(sys.argv[3]))))
"""
_AGENT = Path(__file__).parents[4] / "agent"


class Guest:
    """What is under ``root``; each hook appends its name and first argument to a log."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "root"
        self.root.mkdir()
        self.runtime = folder / "runtime"
        self.runtime.mkdir()
        self.log = folder / "log"
        self.log.touch()

    def write(self, path: str, text: str, mode: int = 0o644) -> Path:
        """A file of the guest."""
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        file.chmod(mode)
        return file

    def hook(self, path: str, body: str = "", mode: int = 0o755) -> Path:
        """A shell script that logs, and then does ``body``."""
        name = Path(path).name
        script = f'#!/bin/sh\necho {name} "$1" >>{self.log}\n{textwrap.dedent(body)}\n'
        return self.write(path, script, mode)

    @property
    def told(self) -> list[str]:
        """Who was told what, in order."""
        return self.log.read_text().splitlines()


class Session:
    """One process of the writer ``MODULE:CLASS``."""

    def __init__(self, guest: Guest, writer: str) -> None:
        command = [sys.executable, "-ISBc", _PROGRAM, str(_AGENT), f"ballast.guest.writers.{writer}", str(guest.root)]
        self._stderr = guest.runtime.parent.joinpath("stderr").open("ab+")
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env={**os.environ, "RUNTIME_DIRECTORY": str(guest.runtime)},
        )

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.communicate()
        self._stderr.close()

    def send(self, verb: str, deadline_s: float = 60, **fields: Any) -> None:
        """A request, whose answer somebody hears later, or nobody."""
        assert self._process.stdin is not None
        request = {"verb": verb, "id": "1", "deadline-ms": round(1000 * deadline_s), **fields}
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        self._process.stdin.flush()

    def hear(self) -> Any:
        """The next answer."""
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())

    def ask(self, verb: str, deadline_s: float = 60, **fields: Any) -> Any:
        """A request and its answer."""
        self.send(verb, deadline_s, **fields)
        return self.hear()

    def begin(self) -> None:
        """All until ``freeze``."""
        assert "error" not in self.ask("identify")
        assert self.ask("prepare") == {}

    def kill(self) -> None:
        """As the agent's guard does it, but without what it has started."""
        self._process.kill()
        self._process.wait()

    def journal(self) -> str:
        """What it has printed on standard error."""
        self._stderr.seek(0)
        return self._stderr.read().decode()
