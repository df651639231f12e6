"""What the guard is made of: little, and loaded before anything is frozen."""

from __future__ import annotations

import subprocess
import sys

import pytest

ALLOWED_OURS = {
    "ballast",
    "ballast.guest",
    "ballast.guest.quiesce",
    "ballast.guest.quiesce.guard",
    "ballast.guest.quiesce.guard_protocol",
    "ballast.guest.quiesce.freezer",
    "ballast.guest.quiesce.lifelines",
}
# What a start of Python brings along here, whatever it is asked to run: editable installs, site customisation.
BARE = "import sys; print(*sys.modules, sep='\\n')"
GUARD = f"import ballast.guest.quiesce.guard; {BARE}"


def modules(program: str) -> set[str]:
    """Names of all modules that a fresh interpreter has loaded after it."""
    ran = subprocess.run([sys.executable, "-B", "-c", program], check=True, capture_output=True, text=True)
    return set(ran.stdout.split())


@pytest.fixture(scope="module")
def loaded() -> set[str]:
    return modules(GUARD) - modules(BARE)


def test_the_guard_imports_no_more_of_ours_than_the_design_allows(loaded: set[str]) -> None:
    ours = {name for name in loaded if name.split(".")[0] == "ballast"}
    assert {name for name in ours - ALLOWED_OURS if not name.startswith("ballast.guest.linux")} == set()
    assert "ballast.guest.linux.uevents" not in ours


def test_the_guard_imports_nothing_else_from_outside_the_standard_library(loaded: set[str]) -> None:
    foreign = {name for name in loaded if name.split(".")[0] not in {*sys.stdlib_module_names, "ballast"}}
    assert foreign == set()


@pytest.mark.parametrize("heavy", ["asyncio", "ssl", "logging", "subprocess", "dataclasses"])
def test_the_guard_stays_small(loaded: set[str], heavy: str) -> None:
    """It is locked in memory."""
    assert heavy not in loaded


def test_without_a_socket_from_systemd_it_says_so() -> None:
    ran = subprocess.run(
        [sys.executable, "-B", "-m", "ballast.guest.quiesce.guard"],
        check=False,
        capture_output=True,
        text=True,
        timeout=10,
    )
    assert ran.returncode == 2
    assert ran.stderr == "ballast-guard: no socket from systemd: it is started by ballast-guard.socket\n"
