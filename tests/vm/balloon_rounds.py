"""The balloon in and out, many times over: python -m tests.vm.balloon_rounds [--count N] [--results FILE] ...

Each round all of the guest's memory is written, the balloon taken to a size that the seed decides, the kernel told to
compact, to take blocks offline or to run programs that need memory, and the balloon given back, in one or two steps. A
round fails if a frame changed while it was pinned, a page of the guest's has changed, anything but the balloon's holder
was OOM-killed, the host did not get what was taken, or does not come back to within 1 % of what it used before.

Results are lines of JSON; rounds of the same commit and seed that the file of results has already are not run again, so
a campaign that was interrupted goes on. The exit status is 1 if any round failed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ballast.host.agent import Agent
from ballast.host.reclaim import Reclaim
from ballast.wire.errors import AgentError
from ballast.wire.memory_names import Ranges
from tests.lab.guest import BootFailed, CommandFailed, Guest
from tests.lab.qemu import is_known_crash
from tests.vm.balloon_faults import order
from tests.vm.bench_machine import Machine
from tests.vm.faults import commit, read_results
from tests.vm.parted import DROP_ALL, LEFT_MIB, MIB, TrialFailed, boot, check, host, inflate

SMALLEST_MIB, LARGEST_MIB, GRAIN_MIB = 64, 384, 2
# What the host must have of what was taken, and by how much its use may differ when all is given back and used.
FREED_LEAST, USE_DIFFERS, FILLS = 0.99, 0.01, 5
SHELL_S = 120.0
_KILLED = re.compile(r"Killed process \d+ \((.+?)\)")
_COMPACT = "echo 1 >/proc/sys/vm/compact_memory"
# A block that holds pages of the balloon stays online, and trying to take it offline may not end: it is given up.
_OFFLINE = """
state=/sys/devices/system/memory/memory%d/state
timeout --kill-after=1 3 sh -c "echo offline >$state" 2>&- || true
[ $(<$state) = online ] || echo online_kernel >$state
"""
# Writes so many MiB, and ends.
_LOAD = ["/usr/bin/python3", "-IBc", "import sys; b = bytearray(b'x') * (int(sys.argv[1]) << 20)"]
# What one load needs of the balloon, and another leaves: more than the floor, below which the balloon gives way.
LOAD_BEYOND_MIB, LOAD_LEAVES_MIB = 64, 300

Harm = Callable[[Guest, random.Random], None]


def _compact(guest: Guest, _: random.Random) -> None:
    guest.run(_COMPACT, timeout_s=SHELL_S)


def _offline(guest: Guest, dice: random.Random) -> None:
    blocks = guest.run("ls -d /sys/devices/system/memory/memory[0-9]* | grep -o '[0-9]*$'").stdout.split()
    guest.run(_OFFLINE % int(dice.choice(blocks)), timeout_s=SHELL_S)


def _load(guest: Guest, _: random.Random) -> None:
    """As much as can be spared."""
    _run_load(guest, beyond_mib=-LOAD_LEAVES_MIB)


def _press(guest: Guest, _: random.Random) -> None:
    """More than is available: the balloon gives way."""
    _run_load(guest, beyond_mib=LOAD_BEYOND_MIB)


def _run_load(guest: Guest, *, beyond_mib: int) -> None:
    available_kib = int(guest.run("grep MemAvailable /proc/meminfo").stdout.split()[1])
    guest.run([*_LOAD, str(max(1, (available_kib >> 10) + beyond_mib))], timeout_s=SHELL_S)


HARMS: dict[str, Harm] = {"compact": _compact, "offline": _offline, "load": _load, "press": _press}


def plan(seed: int, number: int) -> tuple[int, list[str], float]:
    """A round's size in MiB, what is done meanwhile, and the part that is kept for a while when it is given back."""
    dice = random.Random(f"{seed} {number}")
    size_mib = dice.randrange(SMALLEST_MIB, LARGEST_MIB + 1, GRAIN_MIB)
    harms = [dice.choice(["compact", "offline"]), *dice.choices(list(HARMS), k=dice.randrange(3))]
    return size_mib, harms, dice.choice([0.0, 0.0, 0.5])


def run_round(guest: Guest, seed: int, number: int) -> dict[str, Any]:
    """One round's figures. TrialFailed, and whatever a lost guest raises."""
    size_mib, harms, kept = plan(seed, number)
    started_s = time.monotonic()
    guest.run(["dmesg", "--clear"])
    machine = Machine(guest)
    use_before_bytes = _fill(guest, machine)
    figures = asyncio.run(_in_and_out(guest, size_mib * MIB, harms, kept, random.Random(f"{seed} {number} harm")))
    use_after_bytes = 0
    # What is left free each time may be what was punched: other pages are left when it is filled again.
    for _ in range(FILLS):
        use_after_bytes = _fill(guest, machine)
        if abs(use_after_bytes - use_before_bytes) <= USE_DIFFERS * use_before_bytes:
            break
        machine.touch()
    killed = _KILLED.findall(guest.run(["dmesg"]).stdout)
    if others := [name for name in killed if "ballast-balloon" not in name]:
        raise TrialFailed(f"killed: {others}")
    if abs(use_after_bytes - use_before_bytes) > USE_DIFFERS * use_before_bytes:
        raise TrialFailed(f"the host's use was {use_before_bytes} bytes and is {use_after_bytes}; {figures}")
    use_mib = [round(use_before_bytes / MIB, 1), round(use_after_bytes / MIB, 1)]
    took = {"harms": harms, "killed": killed, "seconds": round(time.monotonic() - started_s, 1)}
    return {"mib": size_mib, **figures, "use-mib": use_mib, **took}


def _fill(guest: Guest, machine: Machine) -> int:
    """Have all memory written and looked at, and free again; what that takes on the host."""
    order(guest, f"grab {LEFT_MIB}")
    check(guest)
    use_bytes = machine.used_bytes()
    order(guest, DROP_ALL)
    return use_bytes


async def _in_and_out(guest: Guest, bytes_: int, harms: list[str], kept: float, dice: random.Random) -> dict[str, Any]:
    async with host(guest) as (agent, _, reclaim):
        outcome = await inflate(reclaim, bytes_)
        if outcome.freed_bytes < FREED_LEAST * bytes_:
            raise TrialFailed(f"the host did not get what was taken: {outcome}")
        before = await agent.balloon_ranges()
        for harm in harms:
            await asyncio.to_thread(HARMS[harm], guest, dice)
        after = await agent.balloon_ranges()
        if "press" not in harms and after.total_bytes != before.total_bytes:
            raise TrialFailed(f"it gave way although there was memory: {before.total_bytes}, then {after.total_bytes}")
        if not set(_pages(after.ranges)) <= set(_pages(before.ranges)):
            raise TrialFailed(f"frames have changed: {before}, then {after}")
        await _give_back(agent, reclaim, round(kept * after.total_bytes))
    return {"freed-mib": round(outcome.freed_bytes / MIB, 1), "left-mib": after.total_bytes // MIB}


async def _give_back(agent: Agent, reclaim: Reclaim, kept_bytes: int) -> None:
    """First down to that, if it is anything, then all."""
    if kept_bytes:
        whole = set(_pages((await agent.balloon_ranges()).ranges))
        await reclaim.deflate(kept_bytes)
        left = await agent.balloon_ranges()
        if left.total_bytes > kept_bytes or not set(_pages(left.ranges)) <= whole:
            raise TrialFailed(f"of {kept_bytes} bytes it kept {left}")
    if left_bytes := (await reclaim.deflate(0)).total_bytes:
        raise TrialFailed(f"{left_bytes} bytes are left")


def _pages(ranges: Ranges) -> Iterator[int]:
    return (page for address, bytes_ in ranges for page in range(address, address + bytes_, 4096))


def summary(results: list[dict[str, Any]]) -> str:
    """The figures of them all."""
    good = [one for one in results if "failed" not in one]
    harms = Counter(harm for one in good for harm in one["harms"])
    differences = [abs(one["use-mib"][1] / one["use-mib"][0] - 1) for one in good]
    holder_killed = sum(len(one["killed"]) for one in good)
    return (
        f"{len(results)} rounds, {len(results) - len(good)} failed; {dict(harms)}; the holder OOM-killed "
        f"{holder_killed} times; the host's use differs by {100 * max(differences, default=0):.2f} % at most"
    )


def run_until_lost(guest: Guest, todo: list[int], labels: dict[str, Any], until_s: float) -> Iterator[dict[str, Any]]:
    """Take rounds off ``todo``, and yield what came of each; ends when one failed: the next would begin with it."""
    while todo and time.monotonic() < until_s:
        number = todo.pop(0)
        try:
            yield labels | {"round": number, **run_round(guest, labels["seed"], number)}
        except (TrialFailed, CommandFailed, AgentError, OSError, ValueError, BootFailed) as error:
            if not is_known_crash(guest.dir):
                yield labels | {"round": number, "failed": f"{error!r}\n{guest.console_tail()}"[-8000:]}
            return


def main() -> int:
    """Run the campaign, or go on with it."""
    parser = argparse.ArgumentParser(prog="python -m tests.vm.balloon_rounds", description=__doc__)
    parser.add_argument("--count", type=int, default=1000, help="rounds in all, with those of --results (1000)")
    parser.add_argument("--seed", type=int, default=1, help="decides about sizes and what is done meanwhile (1)")
    parser.add_argument("--minutes", type=float, default=1e6, help="begin no round after that time")
    parser.add_argument("--results", type=Path, help="the file to which results are appended")
    options = parser.parse_args()
    labels = {"commit": commit(), "seed": options.seed}
    earlier = read_results(options.results) if options.results else []
    results = [one for one in earlier if labels.items() <= one.items()]
    done = {one["round"] for one in results}
    todo = [number for number in range(options.count) if number not in done]
    until_s = time.monotonic() + 60 * options.minutes
    while todo and time.monotonic() < until_s:
        with boot("trixie") as guest:
            for result in run_until_lost(guest, todo, labels, until_s):
                results.append(result)
                line = json.dumps(result) + "\n"
                sys.stdout.write(line)
                sys.stdout.flush()
                if options.results:
                    with options.results.open("a") as file:
                        file.write(line)
    sys.stdout.write(summary(results) + "\n")
    return 1 if any("failed" in one for one in results) else 0


if __name__ == "__main__":
    sys.exit(main())
