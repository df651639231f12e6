"""What a guest notices of backups, good ones and bad: python -m tests.vm.backup_trials KIND [--count N] ...

    windows     backups one after the other, full and incremental: how long the guest stood still for each
    killed      `ballastctl backup create --incremental` is killed at a moment that the seed decides
    full        the target runs full while it is copied to
    stalled     who writes to the target is stopped for ten seconds

In the guest a writer on each file system notes when each of its writes was done. After each trial but those of
windows, nothing of ours is left in QEMU and the next increment equals, byte for byte, what the disks were in its frozen
window. The exit status is 1 if a write stood still for more than a second, failed, or anything else is not so.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from ballast.host.storage.catalog import Catalog
from tests.lab.demo_snapshot import longest_gap_s, read_times, start_writers
from tests.lab.demo_stage import read_clock
from tests.lab.guest import Guest
from tests.vm.backed_up import VM, back_up, differing, restored, witnessed, write_config
from tests.vm.conftest import boot

Result = dict[str, Any]

STALL_MAX_S = 1.0
WINDOW_MAX_S = 0.5  # of 95 of 100
TIMEOUT_S = 300.0
STALL_S = 10.0
TARGET_BYTES = 16 << 30  # 40 increments of what the writers write meanwhile


@contextmanager
def target() -> Iterator[Path]:
    """A folder, in which backups go to a file system of their own: it can be filled up, and nobody else suffers."""
    with tempfile.TemporaryDirectory(prefix="ballast-backups-") as name:
        backups = Path(name, "backups")
        backups.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={TARGET_BYTES}", "tmpfs", str(backups)], check=True)
        try:
            yield Path(name)
        finally:
            subprocess.run(["umount", "-l", str(backups)], check=True)


class Trial:
    """A guest with writers, and its backups in a folder."""

    def __init__(self, guest: Guest, folder: Path, seed: int) -> None:
        self.guest = guest
        self.folder = folder
        self.dice = random.Random(seed)
        self.config = write_config(guest, folder)
        self.catalog = Catalog(folder / "backups", VM)
        self.whole_s = 0.0
        self._ahead_s = read_clock(guest).ahead_s

    @property
    def now_s(self) -> float:
        """The guest's clock."""
        return time.time() + self._ahead_s

    def start(self, *words: str) -> subprocess.Popen[str]:
        """Start `ballastctl backup create`."""
        argv = [sys.executable, "-m", "ballast.host.cli", "backup", "create", VM, "--config", str(self.config), *words]
        return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def make(self, *words: str) -> Result:
        """One backup, whole. RuntimeError with what it said."""
        started_s = time.monotonic()
        process = self.start(*words, "--json")
        out, said = process.communicate(timeout=TIMEOUT_S)
        if process.returncode != 0:
            raise RuntimeError(f"{process.returncode}: {said}")
        self.whole_s = time.monotonic() - started_s
        made: Result = json.loads(out)
        return made

    def killed(self) -> str:
        """Kill one at some moment; how it ended."""
        process = self.start("--incremental")
        time.sleep(self.dice.uniform(0.1, 1.0) * self.whole_s)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        return f"ended with {process.returncode}"

    def stalled(self) -> str:
        """Stop who writes for a while, once it writes."""
        process = self.start("--incremental")
        pid = self._writer(process)
        os.kill(pid, signal.SIGSTOP)
        time.sleep(STALL_S)
        os.kill(pid, signal.SIGCONT)
        _, said = process.communicate(timeout=TIMEOUT_S)
        if process.returncode != 0:
            raise RuntimeError(f"a stall of {STALL_S:g} s is no reason to fail: {said}")
        return "done"

    def full(self) -> str:
        """Have the target run full, once it is written to."""
        process = self.start("--incremental")
        self._writer(process)
        filler = self.folder / "backups" / "filler"
        free = os.statvfs(self.folder / "backups")
        with filler.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, max(free.f_bavail * free.f_frsize - (1 << 20), 1))
        _, said = process.communicate(timeout=TIMEOUT_S)
        filler.unlink()
        if process.returncode != 1:
            raise RuntimeError(f"a full target ended with {process.returncode}: {said}")
        return said.strip().splitlines()[-1]

    def _writer(self, process: subprocess.Popen[str]) -> int:
        deadline_s = time.monotonic() + TIMEOUT_S
        while time.monotonic() < deadline_s and process.poll() is None:
            found = subprocess.run(
                ["pgrep", "-P", str(process.pid), "qemu-nbd"], check=False, capture_output=True, text=True
            )
            if found.stdout:
                return int(found.stdout.split()[0])
        raise RuntimeError("nobody wrote to the target")

    def wait_clean(self) -> None:
        """Until nothing of a backup is left in QEMU and the catalogue. TimeoutError."""
        deadline_s = time.monotonic() + 60
        while left := [*self._nodes(), *self.catalog.partials()]:
            if time.monotonic() > deadline_s:
                raise TimeoutError(f"left: {left}")
            time.sleep(0.1)

    def _nodes(self) -> list[str]:
        nodes = self.guest.qmp("query-named-block-nodes", flat=True)
        return [node["node-name"] for node in nodes if node["node-name"].startswith("ballast-")]

    def wrong_increment(self) -> list[str]:
        """Make an increment, and say what of it is not what the disks were in its window."""
        source = witnessed(self.guest, dict, self.folder)
        made = asyncio.run(back_up(source, self.guest, self.folder, incremental=True))
        with restored(self.catalog, made, self.folder / "restored") as images:
            wrong = differing(images, source.reference)
        shutil.rmtree(source.reference)
        return wrong

    def longest_gap_s(self, since_s: float) -> float:
        """The longest time without a write, on any file system, since that moment of the guest's."""
        now_s = self.now_s
        return max(longest_gap_s([*times, now_s], since_s, now_s) for times in read_times(self.guest))


def harmed(trial: Trial, count: int, kind: str) -> Iterator[Result]:
    """So many trials of one kind."""
    harm: Callable[[], str] = getattr(trial, kind)
    trial.make()
    trial.make("--incremental")
    for number in range(count):
        since_s = trial.now_s
        ended = harm()
        trial.wait_clean()
        gap_s = trial.longest_gap_s(since_s)
        complaints = [f"a write stood still for {gap_s:.2f} s"] if gap_s > STALL_MAX_S else []
        complaints += trial.wrong_increment()
        yield {"trial": number, "ended": ended, "gap_s": round(gap_s, 3), "complaints": complaints}


def windows(trial: Trial, count: int) -> Iterator[Result]:
    """So many backups, a full one and the rest on it."""
    for number in range(count):
        made = trial.make(*(["--incremental"] if number else []))
        complaints = [] if made["held"] else ["it did not hold"]
        yield {"trial": number, "kind": made["kind"], "stall_ms": made["stall-ms"], "complaints": complaints}


def _sum_up(results: list[Result]) -> tuple[str, bool]:
    bad = sum(bool(one["complaints"]) for one in results)
    stalls_s = sorted(one["stall_ms"] / 1000 if "stall_ms" in one else one["gap_s"] for one in results)
    late_s = stalls_s[min(len(stalls_s) - 1, round(0.95 * len(stalls_s)))]
    text = f"{len(results)} trials, {bad} with complaints; stood still for {statistics.median(stalls_s):.3f} s in the "
    text += f"median, {late_s:.3f} s at the 95th percentile, {stalls_s[-1]:.3f} s at most"
    return text, bool(bad) or ("stall_ms" in results[0] and late_s > WINDOW_MAX_S)


def main() -> int:
    """Run trials of one kind."""
    parser = argparse.ArgumentParser(prog="python -m tests.vm.backup_trials", description=__doc__)
    parser.add_argument("kind", choices=["windows", "killed", "full", "stalled"])
    parser.add_argument("--count", type=int, default=10)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    results = []
    with boot("trixie") as guest, target() as folder:
        start_writers(guest)
        trial = Trial(guest, folder, options.seed)
        kind = options.kind
        run = windows if kind == "windows" else partial(harmed, kind=kind)
        for result in run(trial, options.count):
            results.append(result)
            sys.stdout.write(json.dumps({"kind": kind, **result}) + "\n")
            sys.stdout.flush()
    text, is_bad = _sum_up(results)
    sys.stdout.write(text + "\n")
    return 1 if is_bad else 0


if __name__ == "__main__":
    sys.exit(main())
