"""What the holder is made of: little, since all of it counts beside what it holds."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.unit.guest.quiesce.test_guard import BARE, modules

ALLOWED_OURS = {
    "ballast",
    "ballast.guest",
    "ballast.guest.memory",
    "ballast.guest.memory.chunk",
    "ballast.guest.memory.holder",
    "ballast.guest.memory.holder_protocol",
}


@pytest.fixture(scope="module")
def loaded() -> set[str]:
    return modules(f"import ballast.guest.memory.holder; {BARE}") - modules(BARE)


def test_the_holder_imports_no_more_than_the_design_allows(loaded: set[str]) -> None:
    ours = {name for name in loaded if name.split(".")[0] == "ballast"}
    assert {name for name in ours - ALLOWED_OURS if not name.startswith("ballast.guest.linux")} == set()
    foreign = {name for name in loaded if name.split(".")[0] not in {*sys.stdlib_module_names, "ballast"}}
    assert foreign == set()


@pytest.mark.parametrize("heavy", ["asyncio", "ssl", "logging", "subprocess", "dataclasses"])
def test_the_holder_stays_small(loaded: set[str], heavy: str) -> None:
    assert heavy not in loaded


def test_without_a_socket_from_systemd_it_says_so() -> None:
    ran = subprocess.run(
        [sys.executable, "-B", "-m", "ballast.guest.memory.holder"],
        check=False,
        capture_output=True,
        text=True,
        timeout=10,
    )
    assert ran.returncode == 2
    assert ran.stderr == "ballast-balloon: no socket from systemd: it is started by ballast-balloon.socket\n"
