"""What Ballast costs a guest in which nothing happens: python -m tests.vm.idle [--suite SUITE] [--seconds SECONDS].

A host reader is on the agent's virtio-serial port, vsock is there and nobody comes by it, and the stock qemu-ga waits
on a port of its own, with a host reader as well: without one it looks ten times a second whether there is one. How
often threads woke up is the kernel's count (voluntary_ctxt_switches: each wake-up ends with one), of which systemd
tells how many were for its watchdog; memory is the kernel's too (smaps_rollup). The lab's own shell, which is Python as
well and would share its pages with us, is stopped meanwhile: what others share is what they would share anywhere. Then
guard and holder are weighed, which run only when they are needed: the guard while it holds file systems frozen, the
holder without the memory that it holds.

Prints JSON; the exit status is 1 if anything is more than what we promise.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import sys
import time
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from ballast.host.agent import Agent
from tests.lab.guest import Guest
from tests.vm.conftest import TOKEN, boot
from tests.vm.raw import Raw
from tests.vm.unit import AGENT, show

PSS_MAX_BYTES = {"trixie": 24 << 20, "bookworm": 20 << 20}
FEED_S = 15.0  # half of the unit's WatchdogSec=
SETTLE_S = 5.0
LONG_S, GRACE_S = 600.0, 90.0
UNITS = {"ballastd": AGENT, "ballast-guard": "ballast-guard.service", "ballast-balloon": "ballast-balloon.service"}
QGA = "qemu-ga"
START_QGA = f"pgrep -x {QGA} || {QGA} --daemonize --path=/dev/virtio-ports/org.qemu.guest_agent.0 --statedir=/run"
CHUNK_BYTES = 64 << 20

LOOKED, WATCHER = "/run/lab-idle-looked", "/run/lab-idle.sh"
_WATCHER = f"""\
look() {{
    for pid; do
        echo "process $pid $(cat /proc/$pid/comm)"
        for task in /proc/$pid/task/*; do
            echo "ran: $(cut -d' ' -f1 $task/schedstat)"
            grep ctxt_switches: $task/status
        done
        grep -E '^(Rss|Pss|Anonymous):' /proc/$pid/smaps_rollup
    done
    echo "fed $(systemctl show --property=WatchdogTimestampMonotonic --value {AGENT})"
}}
seconds=$1
shift
systemctl stop lab-shell.service
sleep {SETTLE_S}
look "$@" >{LOOKED}.before
sleep "$seconds"
look "$@" >{LOOKED}.after
systemctl start lab-shell.service
"""


@dataclass(frozen=True, slots=True)
class Cost:
    """A process: what all of its threads took, since its start or in some time, and what memory it has at the end."""

    name: str
    threads: int
    wake_ups: int
    preempted: int
    cpu_ms: float
    rss_bytes: int
    pss_bytes: int
    anonymous_bytes: int

    def since(self, before: Cost) -> Cost:
        """What it took since then."""
        return replace(
            self,
            wake_ups=self.wake_ups - before.wake_ups,
            preempted=self.preempted - before.preempted,
            cpu_ms=round(self.cpu_ms - before.cpu_ms, 3),
        )

    def without(self, bytes_: int) -> Cost:
        """Without so much memory that it holds for others."""
        return replace(
            self,
            rss_bytes=self.rss_bytes - bytes_,
            pss_bytes=self.pss_bytes - bytes_,
            anonymous_bytes=self.anonymous_bytes - bytes_,
        )


def parse_looks(text: str) -> tuple[dict[int, Cost], int]:
    """What the watcher wrote: processes by pid, and when systemd's watchdog was last fed (µs)."""
    looks = {}
    for pid, name, counts in re.findall(
        r"^process (\d+) (.*)\n((?:\w+: .*\n)+)", text.replace("\t", " "), flags=re.MULTILINE
    ):
        looks[int(pid)] = Cost(
            name=name,
            threads=counts.count("ran: "),
            wake_ups=_sum(counts, "voluntary_ctxt_switches"),
            preempted=_sum(counts, "nonvoluntary_ctxt_switches"),
            cpu_ms=_sum(counts, "ran") / 1e6,
            rss_bytes=1024 * _sum(counts, "Rss"),
            pss_bytes=1024 * _sum(counts, "Pss"),
            anonymous_bytes=1024 * _sum(counts, "Anonymous"),
        )
    return looks, int(re.findall(r"^fed (\d+)$", text, flags=re.MULTILINE)[0])


def _sum(text: str, name: str) -> int:
    return sum(int(value) for value in re.findall(rf"^{name}:\s+(\d+)", text, flags=re.MULTILINE))


def watch(guest: Guest, pids: Sequence[str], seconds: float) -> tuple[list[Cost], int]:
    """Leave the guest alone for so long; what these processes took, and how often the watchdog was fed."""
    guest.put(WATCHER, _WATCHER.encode())
    guest.run(f"rm -f {LOOKED}.*; systemd-run --quiet --collect --no-block sh {WATCHER} {seconds} {' '.join(pids)}")
    time.sleep(SETTLE_S + seconds)
    wait = f"for _ in $(seq 60); do [ -s {LOOKED}.after ] && exit; sleep 1; done; exit 1"
    guest.run(wait, timeout_s=GRACE_S)
    time.sleep(1)
    (before, fed_us), (after, fed_last_us) = (
        parse_looks(guest.get(f"{LOOKED}.{when}").decode()) for when in ("before", "after")
    )
    return [after[pid].since(before[pid]) for pid in after], round((fed_last_us - fed_us) / 1e6 / FEED_S)


def main_pid(guest: Guest, name: str) -> str:
    """Of one of ours, or of qemu-ga."""
    return show(guest, "MainPID", UNITS[name]) if name in UNITS else guest.run(["pgrep", "-x", name]).stdout.strip()


def idle(guest: Guest, seconds: float) -> tuple[list[Cost], int]:
    """The agent, beside qemu-ga, with a reader on the host and nothing to do."""
    guest.run(START_QGA)
    with Raw(f"unix:{guest.ballast_port}") as ours, Raw(f"unix:{guest.qga_port}") as theirs:
        ours.exchange(b"")
        theirs.exchange(b"")
        return watch(guest, [main_pid(guest, name) for name in ("ballastd", QGA)], seconds)


async def weigh_helpers(guest: Guest) -> list[Cost]:
    """Guard and holder at work; the holder without what it holds."""
    session = str(uuid.uuid4())
    async with Agent.connect(f"unix:{guest.vsock_path}?connect=640", TOKEN) as agent:
        await agent.quiesce_begin(session, 60_000, mountpoints=["/mnt/data0"])
        ((guard,), _) = await asyncio.to_thread(watch, guest, [main_pid(guest, "ballast-guard")], 0.0)
        await agent.quiesce_end(session)
        chunk = (await agent.balloon_inflate(CHUNK_BYTES)).chunk
        await agent.balloon_ack(chunk or 0, 0)
        ((holder,), _) = await asyncio.to_thread(watch, guest, [main_pid(guest, "ballast-balloon")], 0.0)
        held_bytes = (await agent.balloon_deflate(0)).bytes
    # Linux 6.1 leaves huge pages that nobody may access out of smaps, 6.12 does not.
    return [guard, holder.without(held_bytes) if holder.rss_bytes > held_bytes else holder]


def broken_promises(suite: str, costs: Sequence[Cost], fed: int) -> list[str]:
    """What is more than it may be, in words."""
    agent = costs[0]
    broken = []
    if agent.wake_ups > fed:
        broken.append(f"{agent.wake_ups} wake-ups, of which {fed} for the watchdog")
    if agent.pss_bytes > PSS_MAX_BYTES[suite]:
        broken.append(f"{agent.pss_bytes / 2**20:.1f} MiB, not {PSS_MAX_BYTES[suite] >> 20}")
    return broken


def main() -> int:
    """Measure."""
    parser = argparse.ArgumentParser(prog="python -m tests.vm.idle", description=__doc__)
    parser.add_argument("--suite", choices=list(PSS_MAX_BYTES), default="trixie")
    parser.add_argument("--seconds", type=float, default=LONG_S, help="how long nothing happens (600)")
    options = parser.parse_args()
    with boot(options.suite) as guest:
        costs, fed = idle(guest, options.seconds)
        costs += asyncio.run(weigh_helpers(guest))
        kernel = guest.run(["uname", "-r"]).stdout.strip()
    broken = broken_promises(options.suite, costs, fed)
    figures: dict[str, Any] = {
        "suite": options.suite,
        "kernel": kernel,
        "seconds": options.seconds,
        "watchdog-wake-ups": fed,
        "processes": [{name.replace("_", "-"): value for name, value in asdict(cost).items()} for cost in costs],
        "broken": broken,
    }
    sys.stdout.write(json.dumps(figures, indent=2) + "\n")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
