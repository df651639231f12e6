"""Who is asked what stands in a freeze's way, in the test's hands."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import pytest

from ballast.guest.bus import Variant


class FakeSystemd:
    """Says what the tools say: ``marks`` grep, ``maps`` dmsetup, ``timers`` systemctl, which is a script in PATH."""

    def __init__(self, folder: Path) -> None:
        self.marks, self.maps = "all\n", ""
        self.started: list[str] = []
        self.units: list[Mapping[str, Variant]] = []
        self.silent: list[int] = []
        self.error: Exception | None = None
        self._folder = folder
        self.timers("exit 0")

    def timers(self, script: str) -> None:
        systemctl = self._folder / "systemctl"
        systemctl.write_text(f"#!/bin/sh\n{script}\n")
        systemctl.chmod(0o755)

    async def start(self, name: str, properties: Mapping[str, Variant], *, stdio_fd: int) -> None:
        if self.error:
            raise self.error
        program = properties["ExecStart"].value[0][0]
        assert name not in self.started
        self.started.append(name)
        self.units.append(properties)
        if self.marks == "silence":
            self.silent.append(os.dup(stdio_fd))
        else:
            os.write(stdio_fd, (self.marks if program == "/bin/sh" else self.maps).encode())


@pytest.fixture
def systemd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSystemd:
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return FakeSystemd(folder)
