"""The linters, as tests. One that is not installed skips, and fails under BALLAST_REQUIRE=all."""

from __future__ import annotations

import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
UNITS = sorted(path for path in (ROOT / "units").iterdir() if path.suffix != ".rules")
# Cold caches on a busy machine.
pytestmark = pytest.mark.timeout(300)


def run(tool: str, *arguments: str | Path, silent_about: str | None = None) -> None:
    """Fail with the tool's own output, and nothing of Python's; skip if there is no such tool.

    ``silent_about``: this tool exits 0 after warnings, so whatever it says with that in it is a failure.
    """
    program = shutil.which(tool, path=sysconfig.get_path("scripts")) or shutil.which(tool)
    if program is None:
        pytest.skip(f"{tool} is not installed")
    result = subprocess.run(
        [program, *arguments], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
    )
    if result.returncode != 0 or (silent_about and silent_about in result.stdout):
        pytest.fail(f"{tool}:\n{result.stdout}", pytrace=False)


def shell_scripts() -> list[Path]:
    """Every file of ours that a shell runs, whatever its name."""
    folders = [ROOT / name for name in (".ci", "packaging", "tests", "tools", "units")]
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    return [path for path in files if path.read_bytes().startswith((b"#!/bin/sh", b"#!/bin/bash"))]


def test_code_is_formatted() -> None:
    run("ruff", "format", "--check", "--diff", "--quiet")


def test_code_has_no_lint() -> None:
    run("ruff", "check", "--quiet", "--output-format=concise")


def test_types_hold() -> None:
    run("mypy")


def test_imports_keep_to_the_design() -> None:
    run("lint-imports", "--no-logo")


def test_words_are_spelled() -> None:
    run("codespell")


def test_shell_scripts_have_no_lint() -> None:
    run("shellcheck", *shell_scripts())


def test_units_are_valid(tmp_path: Path) -> None:
    """As systemd reads them, with a program that exists here in place of ours."""
    for unit in UNITS:
        text = re.sub(r"(?<==)/usr/(sbin|lib)/ballast\S*", "/bin/true", unit.read_text())
        (tmp_path / unit.name).write_text(text)
    # It reads units of this machine as well, and those may be meant for a later systemd.
    run("systemd-analyze", "verify", "--man=no", *sorted(tmp_path.iterdir()), silent_about="ballast")


@pytest.mark.parametrize("unit", [unit for unit in UNITS if unit.suffix == ".service"], ids=lambda unit: unit.name)
def test_service_is_hardened(unit: Path) -> None:
    """4.0 of 10, where qemu-ga has 9.6."""
    run("systemd-analyze", "security", "--offline=yes", "--threshold=40", unit)
