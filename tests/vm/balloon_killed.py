"""A large balloon whose holder is killed: python -m tests.vm.balloon_killed [--gib N] [--count N]

By SIGKILL, and by the OOM killer while the agent is stopped, so that nobody gives way before. Told are the times from
the kill until the process is gone, and until all of its pages are free again, and whom else the kernel has killed.
Figures go to stdout, a line each; the exit status is 1 if anybody else was killed or memory did not come back.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import sys
import time
from typing import Any

from ballast.host.agent import Agent
from ballast.host.balloon import Inflation, Outcome
from ballast.host.qemu import Qemu
from ballast.host.reclaim import Reclaim
from ballast.wire.errors import AgentError
from tests.lab.guest import Guest
from tests.lab.image import build
from tests.vm.conftest import packages

GIB, MIB = 1 << 30, 1 << 20
BESIDE_BYTES = 2 * GIB  # what the guest has beside the balloon
KINDS = ("sigkill", "oom")
INFLATE_S = 400.0
_KILLED = re.compile(r"Killed process \d+ \((.+?)\)")
# Kills the holder, or needs more memory than there is; looks until the pages are free. All of it is there before.
_KILL = """
import os, select, signal, subprocess, sys, time
kind, expected = sys.argv[1], int(sys.argv[2])
def kib(name):
    os.lseek(fd, 0, 0)
    return int(os.read(fd, 8192).split(name)[1].split(None, 2)[0])
fd = os.open("/proc/meminfo", os.O_RDONLY)
pid = int(open("/sys/fs/cgroup/ballast.slice/ballast-balloon.service/cgroup.procs").read())
holder = os.pidfd_open(pid)
available = kib(b"MemAvailable:") << 10
before, load = kib(b"MemFree:") << 10, None
if kind == "oom":
    wanted = available + (768 << 20)
    load = subprocess.Popen([sys.executable, "-IBc", f"b = bytearray({wanted}); m = memoryview(b)\\n"
        f"for at in range(0, {wanted}, 4096): m[at] = 1\\nimport time; time.sleep(5)"])
    select.select([holder], [], [], 120)
    from_s = gone_s = time.monotonic()
else:
    from_s = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    select.select([holder], [], [], 120)
    gone_s = time.monotonic()
while (kib(b"MemAvailable:") << 10) < expected and time.monotonic() < from_s + 60:
    time.sleep(0.002)
back_s = time.monotonic()
code = load.wait() if load else 0
print(round(1000 * (gone_s - from_s), 1), round(1000 * (back_s - from_s), 1), kib(b"MemAvailable:") << 10, code)
"""


async def take(guest: Guest, bytes_: int) -> float:
    """Inflate, with holes on the host; how many seconds that took."""
    async with (
        Agent.connect(f"unix:{guest.ballast_port}", timeout_s=60) as agent,
        Qemu.connect(str(guest.qmp_path)) as machine,
    ):
        reclaim, outcome = Reclaim(agent, machine), Outcome(bytes_, 0)
        from_s = time.monotonic()
        deadline_s = from_s + INFLATE_S
        while outcome.total_bytes < bytes_ and time.monotonic() < deadline_s:
            await reclaim.begin()  # after the last round it is held off for a while
            await Inflation(reclaim, outcome, finish=lambda step: step, advance=lambda _: None).run()
            await asyncio.sleep(0.2)
    if outcome.total_bytes < bytes_:
        raise RuntimeError(f"the balloon does not come to its size: {outcome}")
    return time.monotonic() - from_s


def run(guest: Guest, kind: str, bytes_: int) -> dict[str, Any]:
    """One kill."""
    available_bytes = _available_bytes(guest)
    took_s = asyncio.run(take(guest, bytes_))
    guest.run(["dmesg", "--clear"])
    if kind == "oom":  # its holder keeps the balloon; the agent would give way long before
        guest.run("systemctl stop ballast-agent", timeout_s=60)
    # While the load lives it has what was available, and of the balloon what it needed beyond.
    expected_bytes = (bytes_ - GIB if kind == "oom" else available_bytes) * 98 // 100
    said = guest.run(["/usr/bin/python3", "-IBc", _KILL, kind, str(expected_bytes)], timeout_s=240).stdout.split()
    killed = _KILLED.findall(guest.run(["dmesg"]).stdout)
    sick = guest.run("dmesg | grep -E 'BUG|Oops|Bad page|hung|soft lockup' || true").stdout
    guest.run("systemctl start ballast-agent", timeout_s=60)
    return {
        "kind": kind,
        "mib": bytes_ // MIB,
        "inflate-s": round(took_s, 1),
        "gone-ms": float(said[0]),
        "back-ms": float(said[1]),
        "is-back": int(said[2]) >= expected_bytes * 95 // 100,
        "load-exit": int(said[3]),
        "killed": killed,
        "sick": sick,
        "available-mib": [available_bytes // MIB, _available_bytes(guest) // MIB],
    }


def _available_bytes(guest: Guest) -> int:
    return int(guest.run("grep MemAvailable /proc/meminfo").stdout.split()[1]) * 1024


def main() -> int:
    """Kill, and tell."""
    parser = argparse.ArgumentParser(prog="python -m tests.vm.balloon_killed", description=__doc__)
    parser.add_argument("--gib", type=int, default=16, help="how much the balloon holds (16)")
    parser.add_argument("--count", type=int, default=1, help="of each kind (1)")
    options = parser.parse_args()
    failures, bytes_ = 0, options.gib * GIB
    memory_bytes = bytes_ + BESIDE_BYTES
    size = ("-m", f"maxmem={memory_bytes + BESIDE_BYTES}B")
    with Guest(build("trixie"), memory_bytes=memory_bytes, vsock=False, arguments=size) as guest:
        guest.wait_boot()
        guest.install(packages())
        for kind in KINDS * options.count:
            try:
                result = run(guest, kind, bytes_)
            except (AgentError, OSError, RuntimeError) as error:
                result = {"kind": kind, "failed": repr(error)}
            others = [name for name in result.get("killed", []) if "ballast-balloon" not in name]
            failures += bool(others or result.get("sick") or not result.get("is-back") or result.get("load-exit"))
            sys.stdout.write(json.dumps(result) + "\n")
            sys.stdout.flush()
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
