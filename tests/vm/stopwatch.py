"""Runs inside the guest: freezes and thaws by one agent and then by the other, and sees how long writers stand still.

    stopwatch.py LOAD PAIRS SETTLE_S MOUNTPOINT...

Both agents are told the same, by the same program over a UNIX socket: to freeze these mount points, and to thaw as
soon as they have answered. On each file system a process writes a page every few milliseconds; the gap is the longest
time between two of its writes that the two calls have any part in. Prints one JSON object a line for each freeze.
Loads: idle; buffered and direct, where another process on each file system overwrites a large file, as fast as it may.

The first pair is a rehearsal and not told of. Every other pair has its two agents in the other order.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import mmap
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

BALLAST, QGA = "ballast", "qemu-ga"
SOCKETS = {BALLAST: "/run/ballast/agent.sock", QGA: "/run/bench-qga.sock"}
START_QGA = ["qemu-ga", "--method=unix-listen", f"--path={SOCKETS[QGA]}", "--statedir=/run"]
TIMEOUT_S = 60
RESCUE_S = 45
PERIOD_S = 0.004
STAMPS = 1 << 16  # what is remembered of each probe's writes: four minutes and more
LOG_PAGES = 8192  # more than are written from one freeze to the next
FILE, LOAD_FILE = ".bench-probe", ".bench-load"
BLOCK_BYTES, LOAD_BLOCKS = 1 << 20, 192
_DIRTY = re.compile(r"^(?:Dirty|Writeback): +(\d+) kB$", re.MULTILINE)
_PR_SET_PDEATHSIG = 1


class Writer:
    """A process that writes to a file of its own until it is stopped, or its parent ends."""

    def __init__(self, path: Path, flags: int = 0) -> None:
        self._path = path
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | flags, 0o600)
        self._pid = os.fork()
        if self._pid == 0:
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            self._write_for_ever(fd)
        os.close(fd)

    def stop(self) -> None:
        """End it, and leave nothing behind."""
        os.kill(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)
        self._path.unlink()

    def _write_for_ever(self, fd: int) -> None:
        raise NotImplementedError


class Probe(Writer):
    """Writes page after page of a file, as a log is written, or the same again and again where all is to be idle.

    Leaves the time of each write in memory that it shares with us.
    """

    def __init__(self, mountpoint: str, pages: int) -> None:
        self.mountpoint = mountpoint
        self._pages = pages
        memory = memoryview(mmap.mmap(-1, 8 * (STAMPS + 1)))
        # Views, since struct.pack_into() writes zeros before it writes the value, and the other side may see them.
        self._count, self._times = memory[:8].cast("q"), memory[8:].cast("d")
        super().__init__(Path(mountpoint, FILE))

    @property
    def writes(self) -> int:
        """How many have gone through."""
        return self._count[0]

    def at(self, number: int) -> float:
        """When a write was done (CLOCK_MONOTONIC, seconds)."""
        return self._times[number % STAMPS]

    def longest_gap_s(self, first: int, until_s: float) -> float:
        """The longest time between a write, from number ``first`` on, and the next, to the first after ``until_s``."""
        deadline_s = time.monotonic() + TIMEOUT_S
        longest_s, number = 0.0, first
        while True:
            while self.writes < number + 2:
                if time.monotonic() > deadline_s:
                    sys.exit(f"stopwatch: nobody can write to {self.mountpoint}")
                time.sleep(PERIOD_S)
            longest_s = max(longest_s, self.at(number + 1) - self.at(number))
            number += 1
            if self.at(number) > until_s:
                return longest_s

    def _write_for_ever(self, fd: int) -> None:
        page, number = bytes(mmap.PAGESIZE), 0
        while True:
            os.pwrite(fd, page, number % self._pages * mmap.PAGESIZE)
            self._times[number % STAMPS] = time.monotonic()
            number += 1
            self._count[0] = number
            time.sleep(PERIOD_S)


class Peer:
    """A connection to one of the agents, as its host would have it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(TIMEOUT_S)
        self._socket.connect(SOCKETS[name])

    def ask(self, command: str, **arguments: Any) -> Any:
        """One request and the result."""
        self._socket.sendall(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
        reply = b""
        while not reply.endswith(b"\n"):
            data = self._socket.recv(1 << 16)
            if not data:
                sys.exit(f"stopwatch: {self.name} hung up")
            reply += data
        answer = json.loads(reply)
        if "return" not in answer:
            sys.exit(f"stopwatch: {self.name} answers {command} with {answer}")
        return answer["return"]


class Load(Writer):
    """Overwrites a file from its beginning to its end, again and again: only the disk, or the kernel, slows it down."""

    def __init__(self, kind: str, mountpoint: str) -> None:
        super().__init__(Path(mountpoint, LOAD_FILE), os.O_DIRECT if kind == "direct" else 0)

    def _write_for_ever(self, fd: int) -> None:
        block = mmap.mmap(-1, BLOCK_BYTES)  # a page's boundary is what O_DIRECT wants
        for number in itertools.cycle(range(LOAD_BLOCKS)):
            os.pwrite(fd, block, number * BLOCK_BYTES)


def arm_rescuer(mountpoints: list[str]) -> subprocess.Popen[bytes]:
    """Thaw everything after a while, from another process, should we die."""
    thaw = "; ".join(f"fsfreeze --unfreeze {point}" for point in mountpoints)
    return subprocess.Popen(["setsid", "sh", "-c", f"sleep {RESCUE_S}; {thaw}"], stderr=subprocess.DEVNULL)


def time_freeze(peer: Peer, mountpoints: list[str], probes: list[Probe]) -> dict[str, Any]:
    """Freeze, thaw, and how long that was for whom."""
    dirty_bytes = sum(1024 * int(kib) for kib in _DIRTY.findall(Path("/proc/meminfo").read_text()))
    firsts = [probe.writes - 1 for probe in probes]
    begun_s = time.monotonic()
    frozen = peer.ask("guest-fsfreeze-freeze-list", mountpoints=mountpoints)
    frozen_s = time.monotonic()
    thawed = peer.ask("guest-fsfreeze-thaw")
    thawed_s = time.monotonic()
    if not frozen == thawed == len(mountpoints):
        sys.exit(f"stopwatch: {peer.name} froze {frozen} and thawed {thawed} file systems of {len(mountpoints)}")
    gaps = [probe.longest_gap_s(first, thawed_s) for probe, first in zip(probes, firsts, strict=True)]
    return {
        "agent": peer.name,
        "gap_ms": round(1000 * max(gaps), 3),
        "freeze_ms": round(1000 * (frozen_s - begun_s), 3),
        "thaw_ms": round(1000 * (thawed_s - frozen_s), 3),
        "dirty_bytes": dirty_bytes,
        "gaps_ms": {probe.mountpoint: round(1000 * gap_s, 3) for probe, gap_s in zip(probes, gaps, strict=True)},
    }


def time_pairs(load: str, pairs: int, settle_s: float, mountpoints: list[str], probes: list[Probe]) -> None:
    """Print a line for each freeze."""
    peers = [Peer(BALLAST), Peer(QGA)]
    for number in range(pairs + 1):
        for peer in peers:
            rescuer = arm_rescuer(mountpoints)
            time.sleep(settle_s)  # the load fills the caches again
            result = time_freeze(peer, mountpoints, probes)
            os.killpg(rescuer.pid, signal.SIGKILL)  # not if it failed: then something may be frozen
            rescuer.wait()
            if number > 0:
                line = {"filesystems": len(mountpoints), "load": load, "pair": number, **result}
                sys.stdout.write(json.dumps(line) + "\n")
                sys.stdout.flush()
        peers.reverse()


def start_qga() -> subprocess.Popen[bytes]:
    """Debian's own agent, listening."""
    process = subprocess.Popen(["setpriv", "--pdeathsig", "KILL", "--", *START_QGA])
    deadline_s = time.monotonic() + TIMEOUT_S
    while not Path(SOCKETS[QGA]).is_socket():
        if process.poll() is not None or time.monotonic() > deadline_s:
            sys.exit("stopwatch: qemu-ga does not start")
        time.sleep(PERIOD_S)
    return process


def main() -> None:
    """Leaves nothing behind."""
    load, pairs, settle_s, *mountpoints = sys.argv[1:]
    qga = start_qga()
    probes = [Probe(point, 1 if load == "idle" else LOG_PAGES) for point in mountpoints]
    loads = [Load(load, point) for point in mountpoints if load != "idle"]
    try:
        time_pairs(load, int(pairs), float(settle_s), mountpoints, probes)
    finally:
        writers: list[Writer] = [*loads, *probes]
        for writer in writers:
            writer.stop()
        qga.terminate()
        qga.wait()
        Path(SOCKETS[QGA]).unlink(missing_ok=True)


if __name__ == "__main__":
    main()
