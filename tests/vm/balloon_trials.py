"""The balloon of a guest with memory on both sides of 4 GiB: python -m tests.vm.balloon_trials [--count N] ...

pins: all memory random, a DIMM's too, 256 MiB ballooned, then compaction and offlining; the frames stay, and come back
usable.
forged: answers that no guest of good will gives, while a program in it holds all of its memory.
pressed: half of the memory in the balloon, and a program that needs it: the balloon gives way, nothing is killed.

The figures go to stdout, a line a round; the exit status is 1 if any round failed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import re
import sys
import time
from collections.abc import Callable
from typing import Any

from ballast.host import linux
from ballast.host.agent import Agent
from ballast.host.machine import MemoryMap, WrongRanges
from ballast.host.reclaim import Released, release
from ballast.wire.memory_names import BalloonInflated, Ranges
from tests.lab.guest import Guest
from tests.vm.balloon_faults import order
from tests.vm.parted import (
    BLOCK_BYTES,
    DIMM_BYTES,
    DROP_ALL,
    HIGH,
    LEFT_MIB,
    MEMORY_BYTES,
    MIB,
    PAGE_BYTES,
    TrialFailed,
    boot,
    check,
    held_page,
    host,
    inflate,
    page_of,
)

BALLOON_BYTES, HOLES_LEAST_BYTES = 256 * MIB, 250 * MIB
FORGED = 10_000
DEADLINE_S = 300.0
_SYSFS = "/sys/devices/system/memory"
_OFFLINE = f"""
for block in {_SYSFS}/memory[0-9]*; do
    zone=$(cut -d' ' -f1 $block/valid_zones)
    if timeout --kill-after=1 3 sh -c "echo offline >$block/state" 2>/dev/null; then echo ${{block##*/}} $zone; fi
    if [ $(<$block/state) = offline ]; then
        echo online_$([ $zone = Movable ] && echo movable || echo kernel) >$block/state
    fi
done
"""
# As an administrator may have it: pages of that block can be pinned for long, those of a movable one cannot.
_TO_KERNEL = f"""
until [ "$(<{_SYSFS}/memory%(block)s/valid_zones)" = Normal ]; do
    echo offline >{_SYSFS}/memory%(block)s/state
    echo online_kernel >{_SYSFS}/memory%(block)s/state
    sleep 0.1
done
"""
# stress-ng, its exit status and the most that one of its processes has used, in MiB.
_STRESS = """
import resource, subprocess, sys
argv = ["stress-ng", "--vm", "1", "--vm-bytes", sys.argv[1], "--vm-keep", "--vm-method", "write64"]
ended = subprocess.run([*argv, "--timeout", "15", "--no-oom-adjust"], capture_output=True, text=True)
used_mib = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss >> 10
sys.stderr.write(ended.stderr)
print(ended.returncode, used_mib)
"""
_KILLED = re.compile(r"Killed process \d+ \((.+?)\).*oom_score_adj:(-?\d+)")


# --- pins


async def run_pins(guest: Guest) -> dict[str, Any]:
    """Random data everywhere, then the balloon, compaction and offlining, then everything used again."""
    dimm = _plug_in(guest)
    filled_pages = order(guest, f"grab {LEFT_MIB}")["pages"]
    order(guest, DROP_ALL)
    async with host(guest) as (agent, machine, reclaim):
        outcome = await inflate(reclaim, BALLOON_BYTES)
        result = await _hold_still(guest, agent, await machine.memory(), dimm)
    usable_pages = order(guest, f"grab {LEFT_MIB}")["pages"]
    check(guest)
    order(guest, DROP_ALL)
    if outcome.freed_bytes < HOLES_LEAST_BYTES or usable_pages * PAGE_BYTES < filled_pages * PAGE_BYTES - 32 * MIB:
        raise TrialFailed(f"{outcome}, {filled_pages} pages before, {usable_pages} after")
    return result | {"freed-mib": outcome.freed_bytes / MIB, "usable-mib": usable_pages * PAGE_BYTES // MIB}


def _plug_in(guest: Guest) -> int:
    """Where a DIMM begins of which the first block is the kernel's and the other movable; it stays for later rounds."""
    if not guest.qmp("query-memory-devices"):
        guest.hot_add(DIMM_BYTES, "trial")
    blocks = (MEMORY_BYTES + DIMM_BYTES) // BLOCK_BYTES
    online = f"until [ $(grep -lx online {_SYSFS}/memory*/state | wc -l) -eq {blocks} ]; do sleep 0.1; done"
    address = int(guest.qmp("query-memory-devices")[0]["data"]["addr"])
    guest.run(online + _TO_KERNEL % {"block": address // BLOCK_BYTES}, timeout_s=60)
    return address


async def _hold_still(guest: Guest, agent: Agent, memory: MemoryMap, dimm: int) -> dict[str, Any]:
    """Whatever the kernel is told to do, no frame moves, and no hole is filled."""
    before = await agent.balloon_ranges()
    holes = [_hole_bytes(memory, before.ranges)]
    script = "for i in 1 2 3; do echo 1 >/proc/sys/vm/compact_memory; done"
    await asyncio.to_thread(guest.run, script, timeout_s=DEADLINE_S)
    offlined = (await asyncio.to_thread(guest.run, _OFFLINE, timeout_s=DEADLINE_S)).stdout.split("\n")
    after = await agent.balloon_ranges()
    holes.append(_hole_bytes(memory, after.ranges))
    if (after.ranges, after.generation) != (before.ranges, before.generation):
        raise TrialFailed(f"frames have changed: {before}, then {after}")
    places = {"below-4g-mib": (0, HIGH), "above-4g-mib": (HIGH, dimm), "dimm-mib": (dimm, dimm + DIMM_BYTES)}
    where = {name: _bytes_within(after.ranges, *place) / MIB for name, place in places.items()}
    if not all(where.values()) or min(holes) < HOLES_LEAST_BYTES:
        raise TrialFailed(f"holes of {holes} bytes: {where}")
    figures = {"holes-mib": [bytes_ / MIB for bytes_ in holes], **where}
    return figures | {"ranges": len(after.ranges), "offlined": [block for block in offlined if block]}


def _bytes_within(ranges: Ranges, start: int, end: int) -> int:
    return sum(max(0, min(end, address + bytes_) - max(start, address)) for address, bytes_ in ranges)


def _hole_bytes(memory: MemoryMap, ranges: Ranges) -> int:
    return sum(one.bytes - linux.allocated_bytes(one.fd, one.offset, one.bytes) for one in memory.locate(ranges))


# --- forged


async def run_forged(guest: Guest, count: int = FORGED) -> dict[str, Any]:
    """Each forged answer is refused or harmless."""
    order(guest, f"grab {LEFT_MIB}")
    seed = time.monotonic_ns()
    chance = random.Random(seed)
    async with host(guest) as (_, machine, reclaim):
        memory = await machine.memory()
        for name, ranges in _named_forgeries(guest, memory).items():
            bytes_ = sum(one[1] for one in ranges)
            answer = BalloonInflated(1, bytes_, bytes_, ranges, done=True, floor=False)
            with contextlib.suppress(WrongRanges):
                released = await reclaim.punch(answer)
                if not name.startswith("page of"):
                    raise TrialFailed(f"{name} was not refused: {released}")
        refused, released = 0, Released(0, 0, 0, 0)
        for _ in range(count):
            try:
                released += release(memory.locate(_random_ranges(chance, memory)))
            except WrongRanges:
                refused += 1
    pages = check(guest)
    order(guest, DROP_ALL)
    figures = {"punched-mib": released.punched_bytes / MIB, "not-zero-mib": released.not_zero_bytes / MIB}
    return {"seed": seed, "forged": count, "refused": refused, "verified-mib": pages * PAGE_BYTES // MIB, **figures}


def _named_forgeries(guest: Guest, memory: MemoryMap) -> dict[str, Ranges]:
    init, page = page_of(guest, "1"), held_page(guest)
    end = max(one.address + one.bytes for one in memory.regions)
    return {
        "page of init": [[init, PAGE_BYTES]],
        "page of the checker": [[page, PAGE_BYTES]],
        "page 0": [[0, PAGE_BYTES]],
        "below 1 MiB": [[MIB - PAGE_BYTES, PAGE_BYTES]],
        "nothing": [[page, 0]],
        "beyond": [[1 << 40, PAGE_BYTES]],
        "at the end": [[end - PAGE_BYTES, 2 * PAGE_BYTES]],
        "between": [[HIGH - PAGE_BYTES, 2 * PAGE_BYTES]],
        "unaligned": [[page + 1, PAGE_BYTES]],
        "odd": [[page, PAGE_BYTES + 1]],
        "negative": [[page, -PAGE_BYTES]],
        "twice": [[page, PAGE_BYTES], [page, PAGE_BYTES]],
        "falling": [[page, PAGE_BYTES], [page - PAGE_BYTES, PAGE_BYTES]],
        "everything": [[MIB, end - MIB]],
    }


def _random_ranges(chance: random.Random, memory: MemoryMap) -> Ranges:
    """Mostly some pages of RAM; now and then something that is none."""
    region = chance.choice(memory.regions)
    address = region.address + chance.randrange(region.bytes // PAGE_BYTES) * PAGE_BYTES
    bytes_ = chance.randint(1, 16) * PAGE_BYTES
    kind = chance.random()
    if kind < 0.1:
        return [[chance.randrange(1 << 46) * PAGE_BYTES, bytes_]]
    if kind < 0.2:
        return [[address + chance.randrange(PAGE_BYTES), bytes_ + chance.randrange(PAGE_BYTES)]]
    if kind < 0.3:
        return [[address, bytes_], [address + chance.randrange(bytes_ // PAGE_BYTES) * PAGE_BYTES, bytes_]]
    return [[address, bytes_]]


# --- pressed


async def run_pressed(guest: Guest) -> dict[str, Any]:
    """The balloon gives way to a program that needs what it has."""
    guest.run(["dmesg", "--clear"])
    async with host(guest) as (agent, _, reclaim):
        before = await agent.memory_status()
        await inflate(reclaim, before.total_bytes // 2, least=0.9)
        pressed = await agent.memory_status()
        wanted_bytes = pressed.available_bytes + pressed.balloon.bytes // 2
        argv = ["/usr/bin/python3", "-c", _STRESS, str(wanted_bytes)]
        stress = await asyncio.to_thread(guest.run, argv, timeout_s=DEADLINE_S)
        left_bytes = (await agent.memory_status()).balloon.bytes
        causes = [event.data["cause"] for event in agent.take_events()]
    status, used_mib = map(int, stress.stdout.split())
    killed = _KILLED.findall(guest.run(["dmesg"]).stdout)
    result: dict[str, Any] = {
        "balloon-mib": [pressed.balloon.bytes >> 20, left_bytes >> 20],
        "available-mib": pressed.available_bytes >> 20,
        "wanted-mib": wanted_bytes >> 20,
        "used-mib": used_mib,
        "gave-way": causes.count("pressure"),
        "holder-lost": causes.count("holder-lost"),
        "killed": killed,
    }
    others = [name for name, adjustment in killed if adjustment != "1000"]
    if status or others or used_mib < 0.9 * result["wanted-mib"] or not {"pressure", "holder-lost"} & set(causes):
        raise TrialFailed(f"stress-ng ended with {status}: {stress.stderr}; {causes}, {result}")
    return result


# The DIMM that comes with the last one stays.
KINDS: dict[str, Callable[[Guest], Any]] = {"pressed": run_pressed, "forged": run_forged, "pins": run_pins}


def main() -> int:
    """Run them."""
    parser = argparse.ArgumentParser(prog="python -m tests.vm.balloon_trials", description=__doc__)
    parser.add_argument("--count", type=int, default=10, help="rounds of each kind (10)")
    parser.add_argument("--only", choices=list(KINDS), action="append", help="only this kind; may be repeated")
    parser.add_argument("--suite", default="trixie", help="the guest's Debian (trixie)")
    options = parser.parse_args()
    failures = 0
    with boot(options.suite) as guest:
        for kind in options.only or KINDS:
            for number in range(options.count):
                started_s = time.monotonic()
                try:
                    result = json.dumps(asyncio.run(KINDS[kind](guest)))
                except TrialFailed as error:
                    failures += 1
                    result = f"FAILED: {error}"
                sys.stdout.write(f"{kind} {number + 1}: {result} {time.monotonic() - started_s:.0f} s\n")
                sys.stdout.flush()
    sys.stdout.write(f"{failures} failed\n")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
