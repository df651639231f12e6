"""What is installed as a writer: it says what it needs where the agent looks for that, and runs the loop."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[4]
LAUNCHERS = sorted((ROOT / "packaging/writers").iterdir())


@pytest.fixture(params=LAUNCHERS, ids=lambda path: path.name)
def launcher(request: pytest.FixtureRequest) -> Path:
    path: Path = request.param
    return path


def test_it_can_be_executed_and_says_what_it_needs(launcher: Path) -> None:
    assert launcher.stat().st_mode & 0o111 == 0o111
    assert b"\n# ballast-needs: " in launcher.read_bytes()[:1024]


def test_it_answers(launcher: Path, tmp_path: Path) -> None:
    text = launcher.read_text()
    shebang, program = text.partition("\n")[0], text.replace("/usr/lib/ballast", str(ROOT / "agent"))
    command = [*shebang.removeprefix("#!").split(), "-c", program]
    request = json.dumps({"verb": "none-that-does-anything", "id": "1", "deadline-ms": 1000})
    environment = {"RUNTIME_DIRECTORY": str(tmp_path)}  # as the unit has it
    ended = subprocess.run(command, input=f"{request}\n", env=environment, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "error" in json.loads(ended.stdout)
