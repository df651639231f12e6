"""ballastctl backup from one end to the other: a guest is backed up while it runs, and what came of it lives."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.lab.guest import Guest
from tests.vm.backed_up import VM, write_config
from tests.vm.test_ballastctl import ENVIRONMENT

DEADLINE_S = 900.0
WORD = "written between the two backups"


@pytest.fixture
def ballastctl(guest: Guest, tmp_path: Path) -> Callable[..., Any]:
    """Run a command of the group, as a program would; its JSON."""
    config = write_config(guest, tmp_path)

    def run(verb: str, *words: str) -> Any:
        argv = [sys.executable, "-m", "ballast.host.cli", "backup", verb, VM, *words, "--config", str(config), "--json"]
        # As every guest of the lab: where KVM is, it may be half there.
        environment = ENVIRONMENT | {"LIBGUESTFS_BACKEND_SETTINGS": "force_tcg"}
        ended = subprocess.run(argv, capture_output=True, text=True, env=environment, timeout=DEADLINE_S, check=False)
        assert ended.returncode == 0, ended.stdout + ended.stderr
        return json.loads(ended.stdout)

    return run


def test_a_running_guests_backup_is_whole_and_boots_by_itself(
    guest: Guest, ballastctl: Callable[..., Any], tmp_path: Path, measured: Callable[[str], None]
) -> None:
    full = ballastctl("create", "--incremental")
    assert (full["kind"], full["why-full"], full["held"]) == ("full", "there is no backup yet", True)
    guest.run(f"echo '{WORD}' >/root/between")
    made = ballastctl("create", "--incremental")
    assert (made["kind"], made["base"], made["held"]) == ("incremental", full["id"], True)
    listed = ballastctl("list")
    assert [one["id"] for one in listed["backups"]] == [full["id"], made["id"]]

    told = ballastctl("verify", "--filesystems", "--boot")
    assert told["wrong"] == []
    assert {one["disk"] for one in told["filesystems"]} == set(made["disks"])
    assert told["boot"]["agent"] == full["ballast"]

    (root,) = ballastctl("restore", "--to", str(tmp_path / "out"), "--format", "raw", "--disk", "disk-root")["disks"]
    said = subprocess.run(["debugfs", "-R", "cat /root/between", root], capture_output=True, text=True, check=True)
    assert said.stdout == f"{WORD}\n"
    stalls = f"{full['stall-ms']:.0f} and {made['stall-ms']:.0f} ms"
    measured(f"a full backup and an increment: stood still for {stalls}; booted after {told['boot']['boot-s']:.0f} s")
