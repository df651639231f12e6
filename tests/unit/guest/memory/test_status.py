"""The whole record, from what real guests showed."""

from __future__ import annotations

import asyncio
import re
import shutil
from typing import Any

import pytest

from ballast.guest.events import Events, Subscription
from ballast.guest.linux.meminfo import parse_meminfo
from ballast.guest.linux.psi import PRESSURE_FILE
from ballast.guest.linux.tree import Tree
from ballast.guest.memory.balloon import Balloon
from ballast.guest.memory.blocks import Blocks
from ballast.guest.memory.floor import floor_bytes
from ballast.guest.memory.level import PressureLevel
from ballast.guest.memory.status import MemoryFacts
from ballast.wire.memory_names import BalloonState, BlockCounts
from ballast.wire.message import Event


@pytest.fixture
def facts(recorded: Tree) -> MemoryFacts:
    balloon = Balloon(recorded, Events(), boot_id="a-b")
    return MemoryFacts(recorded, PressureLevel(recorded), Blocks(recorded), balloon, boot_id="a-b")


def kib(tree: Tree, name: str) -> int:
    """One line of /proc/meminfo, in bytes."""
    match = re.search(rf"^{re.escape(name)}: +(\d+) kB$", tree.read("proc/meminfo"), re.MULTILINE)
    assert match is not None
    return 1024 * int(match.group(1))


def test_status_is_what_the_kernel_says(recorded: Tree, facts: MemoryFacts) -> None:
    status = facts.read()
    assert status.boot_id == "a-b"
    assert status.total_bytes == kib(recorded, "MemTotal")
    assert status.available_bytes == kib(recorded, "MemAvailable")
    assert status.free_bytes == kib(recorded, "MemFree")
    assert status.cached_bytes == kib(recorded, "Cached") + kib(recorded, "SReclaimable")
    assert status.committed_bytes == kib(recorded, "Committed_AS")
    assert (status.swap_total_bytes, status.swap_free_bytes) == (0, 0)
    assert status.demand["unreclaimable"] == status.total_bytes - status.available_bytes
    assert status.demand_bytes == sum(status.demand.values()) == floor_bytes(status.total_bytes)
    assert status.blocks == BlockCounts(128 << 20, 10, 2, 2)
    assert status.balloon == BalloonState(0, 0)
    assert status.level == "low"
    assert status.psi is not None
    assert 0 <= status.psi.full.total_us <= status.psi.some.total_us


def test_status_without_psi_says_so(recorded: Tree, facts: MemoryFacts) -> None:
    """Then its control groups have none either."""
    recorded.path(PRESSURE_FILE).unlink()
    shutil.rmtree(recorded.path("sys/fs/cgroup"), ignore_errors=True)
    status = facts.read()
    assert status.psi is None
    assert (status.level, status.level_source) == ("low", "vmstat")


def test_lists_are_those_of_the_kernel_without_the_balloon(recorded: Tree, facts: MemoryFacts) -> None:
    before = facts.read().lru
    assert before is not None
    assert before.active_file_bytes + before.inactive_file_bytes == kib(recorded, "Active(file)") + kib(
        recorded, "Inactive(file)"
    )
    memory = parse_meminfo(recorded.read("proc/meminfo"))
    assert facts._lru(memory, 1 << 20) is None  # nobody tells on which list they are
    stat = recorded.path("sys/fs/cgroup/ballast.slice/ballast-balloon.service/memory.stat")
    stat.parent.mkdir(parents=True)
    stat.write_text("active_anon 4096\ninactive_anon 1099511627776\n")
    after = facts._lru(memory, 1 << 20)
    assert after is not None
    assert after.active_anon_bytes == max(0, before.active_anon_bytes - 4096)
    assert after.inactive_anon_bytes == 0
    assert after.active_file_bytes == before.active_file_bytes


def test_readings_are_learnt_from(recorded: Tree, facts: MemoryFacts) -> None:
    first = facts.read()
    for name, line in (("proc/vmstat", "workingset_refault_file 0"), ("proc/meminfo", "SwapTotal:             0 kB")):
        recorded.path(name).write_text(recorded.read(name).replace(line, line.replace(" 0", " 1000")) + "\n")
    second = facts.read()
    assert first.demand["hot-cache"] == first.demand["swapped"] == 0
    assert 3_900_000 < second.demand["hot-cache"] <= 4_096_000
    assert second.demand["swapped"] == second.swap_total_bytes == 1_024_000


async def test_demand_is_reported_at_once_and_again_until_stopped(facts: MemoryFacts) -> None:
    events: asyncio.Queue[Event] = asyncio.Queue()

    def deliver(event: Event) -> bool:
        events.put_nowait(event)
        return True

    stop = facts.report_every(0.01, Subscription(frozenset(), deliver))
    async with asyncio.timeout(10):
        heard = [await events.get() for _ in range(3)]
    stop()
    assert [(event.name, event.seq) for event in heard] == [("BALLAST_DEMAND", n) for n in (1, 2, 3)]
    assert heard[0].data["blocks"]["online"] == 10


async def test_a_peer_that_takes_no_more_is_reported_to_no_more(facts: MemoryFacts) -> None:
    refused: list[Any] = []
    done = asyncio.Event()

    def deliver(event: Event) -> bool:
        refused.append(event)
        done.set()
        return False

    facts.report_every(0.0, Subscription(frozenset(), deliver))
    async with asyncio.timeout(10):
        await done.wait()
    for _ in range(5):
        await asyncio.sleep(0)
    assert len(refused) == 1


async def test_stopped_before_the_first_report_nothing_is_sent(facts: MemoryFacts) -> None:
    sent: list[Any] = []

    def deliver(event: Event) -> bool:
        sent.append(event)
        return True

    facts.report_every(0.0, Subscription(frozenset(), deliver))()
    for _ in range(5):
        await asyncio.sleep(0)
    assert sent == []
