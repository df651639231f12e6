"""`ballastctl backup create` killed at any moment: the dead man cleans up, and the next increment misses nothing."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ballast.host.storage.catalog import Catalog
from tests.lab.still_machine import StillMachine, still_machine

MIB = 1 << 20
SIZES = {"root": 32 * MIB, "data": 16 * MIB}
TIMEOUT_S = 60.0
KILLS = 8


class Lab:
    """A machine in a host's configuration."""

    def __init__(self, machine: StillMachine, folder: Path) -> None:
        self.machine = machine
        self.folder = folder
        self.catalog = Catalog(folder / "backups", "lab")
        self.config = folder / "host.toml"
        self.config.write_text(
            f'[vm.lab]\nagent = "unix:{folder}/none"\nqmp = "unix:{machine.qmp}"\n'
            f'[backup]\ntarget = "{folder}/backups"\nfleece = "{folder}/fleece"\nfleece-timeout-s = 10\n'
        )

    def start(self, verb: str, *words: str) -> subprocess.Popen[str]:
        argv = [sys.executable, "-m", "ballast.host.cli", "backup", verb, "lab", "--config", str(self.config), *words]
        return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def run(self, verb: str, *words: str) -> Any:
        """Run it to its end, the guest writing all the time; what it says in JSON."""
        process = self.start(verb, *words, "--json")
        while process.poll() is None:
            self.machine.scribble(1)
        out, said = process.communicate()
        assert process.returncode == 0, said
        return json.loads(out)

    def wait_dead_man(self) -> None:
        """Until he has let go of the catalogue and nothing is left."""
        deadline_s = time.monotonic() + TIMEOUT_S
        while self.machine.nodes_of_ours() or self.catalog.partials() or self._is_listening():
            assert time.monotonic() < deadline_s, (self.machine.nodes_of_ours(), self.catalog.partials())
            self.machine.scribble(1)

    def _is_listening(self) -> bool:
        found = subprocess.run(["pgrep", "-f", f"listen --config {self.config}"], check=False, capture_output=True)
        return found.returncode == 0

    def assert_right(self, id_: str) -> None:
        """The backup holds what the machine holds; nothing may be written meanwhile."""
        out = self.folder / f"out-{id_}"
        self.quiet("restore", "--id", id_, "--to", str(out), "--format", "raw")
        assert {path.stem: path.read_bytes() for path in out.iterdir()} == self.machine.snapshot()

    def quiet(self, verb: str, *words: str) -> Any:
        """Run it to its end while nothing is written; what it says in JSON."""
        process = self.start(verb, *words, "--json")
        out, said = process.communicate(timeout=TIMEOUT_S)
        assert process.returncode == 0, said
        return json.loads(out)


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    paths = {name: tmp_path / f"{name}.qcow2" for name in SIZES}
    for name, path in paths.items():
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(path), str(SIZES[name])], check=True)
    held = {name: bytearray(bytes_) for name, bytes_ in SIZES.items()}
    with still_machine(tmp_path / "qemu", paths, held) as machine:
        machine.scribble(20)
        yield Lab(machine, tmp_path)


@pytest.mark.timeout(300)
def test_whoever_is_killed_leaves_nothing_and_the_next_increment_is_right(lab: Lab) -> None:
    started_s = time.monotonic()
    made = lab.run("create", "--level", "none")
    whole_s = time.monotonic() - started_s
    dice = random.Random(0)
    for _ in range(KILLS):
        killed = lab.start("create", "--level", "none", "--incremental")
        until_s = time.monotonic() + dice.uniform(0.2, 1) * whole_s
        while time.monotonic() < until_s:
            lab.machine.scribble(1)
        killed.send_signal(signal.SIGKILL)
        killed.communicate()
        lab.wait_dead_man()
        lab.machine.scribble(3)
        made = lab.quiet("create", "--level", "none", "--incremental")
        assert made["kind"] == "incremental", made
        lab.assert_right(made["id"])
    assert lab.quiet("verify")["wrong"] == []


@pytest.mark.timeout(120)
def test_what_is_left_when_the_dead_man_is_killed_too_is_repaired(lab: Lab) -> None:
    lab.run("create", "--level", "none")
    killed = lab.start("create", "--level", "none", "--incremental")
    deadline_s = time.monotonic() + TIMEOUT_S
    while not lab.machine.nodes_of_ours():
        assert time.monotonic() < deadline_s
        assert killed.poll() is None
    listening = subprocess.run(
        ["pgrep", "-f", f"listen --config {lab.config}"], check=True, capture_output=True, text=True
    )
    for pid in (*listening.stdout.split(), str(killed.pid)):
        subprocess.run(["kill", "-KILL", pid], check=True)
    killed.communicate()
    assert lab.machine.nodes_of_ours()
    said = lab.quiet("repair")["repaired"]
    assert any("block nodes" in sentence for sentence in said)
    assert lab.machine.nodes_of_ours() == []
    assert lab.catalog.partials() == []
    assert lab.quiet("repair")["repaired"] == []
    made = lab.quiet("create", "--level", "none", "--incremental")
    assert made["kind"] == "incremental"
    lab.assert_right(made["id"])


def test_a_machine_that_is_not_there_is_told(lab: Lab) -> None:
    lab.config.write_text(lab.config.read_text().replace(str(lab.machine.qmp), "/nowhere"))
    process = lab.start("create", "--level", "none")
    _, said = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 3
    assert "/nowhere" in said
    assert lab.catalog.partials() == []
