"""DIMMs in a real guest come off whole, or stay as they were; what is leaving stays offline until the host says so."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager

import pytest
import pytest_asyncio

from ballast.host.agent import Agent
from ballast.wire.errors import BadRequest
from ballast.wire.memory_names import BlockResult
from tests.lab.guest import Guest
from tests.vm.dimms import Campaign
from tests.vm.test_memory import BLOCK_BYTES, DEADLINE_S, SYSFS, dimm, hear, indexes, states
from tests.vm.unit import AGENT

ADDRESS = 4 << 30  # where QEMU puts the first DIMM of a guest with little boot memory
ROUNDS = 2

# Holds pages of one block by a pipe (vmsplice): they can be moved by no kernel until the pipe is gone.
PIN = """
import ctypes, mmap, os, struct, sys
block, block_bytes, mib = map(int, sys.argv[1:])
memory = mmap.mmap(-1, mib << 20)
for at in range(0, len(memory), 4096):
    memory[at] = 1
base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
with open("/proc/self/pagemap", "rb") as pagemap:
    pagemap.seek(base // 4096 * 8)
    entries = struct.unpack(f"<{mib * 256}Q", pagemap.read(mib * 256 * 8))
pages = [n for n, entry in enumerate(entries) if (entry & (1 << 55) - 1) * 4096 // block_bytes == block][:16]
vectors = b"".join(struct.pack("<QQ", base + 4096 * n, 4096) for n in pages)
reader, writer = os.pipe()
assert pages and ctypes.CDLL(None).vmsplice(writer, vectors, len(pages), 0) == 4096 * len(pages)
memory.madvise(mmap.MADV_DONTNEED)
print("pinned", flush=True)
sys.stdin.read()
"""

# Leaves the blocks that are leaving twenty seconds more: time enough for an agent to start and a host to subscribe.
SHORTEN = """
import json, pathlib, time
path = pathlib.Path("/run/ballast/leaving.json")
until_s = time.clock_gettime(time.CLOCK_BOOTTIME) + 20
path.write_text(json.dumps({block: [zone, until_s] for block, (zone, _) in json.loads(path.read_text()).items()}))
"""


@pytest.fixture
def blocks(guest: Guest) -> Iterator[list[int]]:
    """The blocks of a DIMM that the agent has brought online as movable memory."""
    with dimm(guest, "dimm-offline", 2 * BLOCK_BYTES) as blocks:
        wait_online(guest, blocks)
        yield sorted(blocks)


@pytest_asyncio.fixture
async def agent(vsock: str, token: str) -> AsyncIterator[Agent]:
    async with Agent.connect(vsock, token) as connected:
        yield connected


def wait_online(guest: Guest, blocks: set[int] | list[int]) -> None:
    for block in blocks:
        guest.run(f"until grep -qx online {SYSFS}/memory{block}/state; do sleep 0.1; done", timeout_s=DEADLINE_S)


@contextmanager
def pinned(guest: Guest, block: int) -> Iterator[None]:
    """A block that the kernel tries to empty for ever."""
    said = "/run/lab-pin"
    program = f'/usr/bin/python3 -c "$0" {block} {BLOCK_BYTES} 320 >{said} <>{said}.in'
    guest.run(["/bin/bash", "-ec", f"mkfifo {said}.in; setsid {program} 2>&1 & echo $! >{said}.pid", PIN])
    guest.run(f"until grep -q . {said}; do sleep 0.1; done; grep -qx pinned {said} || {{ cat {said}; exit 1; }}")
    try:
        yield
    finally:
        guest.run(f"kill $(cat {said}.pid); rm {said} {said}.in {said}.pid")


def told(results: list[BlockResult]) -> dict[int, tuple[str, str | None]]:
    return {one.phys_index: (one.result, one.reason) for one in results}


async def test_a_dimm_is_offline_whole_and_stays_so_until_the_host_asks(
    guest: Guest, agent: Agent, vsock: str, token: str, blocks: list[int]
) -> None:
    boot = indexes(guest) - set(blocks)
    for wrong in ({"blocks": [min(boot)]}, {"blocks": [min(boot), *blocks]}, {"dimm": 0}, {"dimm": ADDRESS + 1}):
        with pytest.raises(BadRequest, match="DIMM"):
            await agent.memory_offline(**wrong)
    assert (await agent.memory_offline(bytes_=2 * BLOCK_BYTES - 1)).dimms == []
    assert set(states(guest, set(blocks)).values()) == {("online", "Movable")}
    done = await agent.memory_offline(bytes_=3 * BLOCK_BYTES)
    assert (done.bytes, told(done.blocks)) == (2 * BLOCK_BYTES, dict.fromkeys(blocks, ("done", None)))
    assert [(one.address, one.bytes, one.offline) for one in done.dimms] == [(ADDRESS, 2 * BLOCK_BYTES, True)]
    await asyncio.to_thread(guest.run, ["systemctl", "restart", AGENT])
    async with Agent.connect(vsock, token) as restarted:
        assert (await restarted.memory_online(bytes_=2 * BLOCK_BYTES)).blocks == []
        again = await restarted.memory_offline(bytes_=2 * BLOCK_BYTES)
        assert (again.bytes, told(again.blocks)) == (0, dict.fromkeys(blocks, ("already", None)))
        assert {state for state, _ in states(guest, set(blocks)).values()} == {"offline"}
        back = await restarted.memory_online()
        assert told(back.blocks) == dict.fromkeys(blocks, ("done", None))
    assert set(states(guest, set(blocks)).values()) == {("online", "Movable")}
    assert {state for state, _ in states(guest, boot).values()} == {"online"}


async def test_a_block_that_cannot_be_emptied_is_named_and_the_dimm_is_as_before(
    guest: Guest, agent: Agent, blocks: list[int]
) -> None:
    low, high = blocks
    with pinned(guest, low):
        result = await agent.memory_offline(dimm=ADDRESS, timeout_ms=5000)
        assert told(result.blocks) == {low: ("failed", "deadline"), high: ("failed", "undone")}
        assert [one.offline for one in result.dimms] == [False]
        assert set(states(guest, set(blocks)).values()) == {("online", "Movable")}
    assert (await agent.memory_offline(dimm=ADDRESS)).bytes == 2 * BLOCK_BYTES


async def test_an_agent_that_is_killed_in_the_middle_leaves_no_dimm_half_offline(
    guest: Guest, agent: Agent, blocks: list[int]
) -> None:
    low, high = blocks
    with pinned(guest, low):
        asked = asyncio.create_task(agent.memory_offline(dimm=ADDRESS, timeout_ms=60_000))
        await asyncio.to_thread(guest.run, f"until grep -qx offline {SYSFS}/memory{high}/state; do sleep 0.1; done")
        await asyncio.to_thread(guest.run, ["systemctl", "kill", "--signal=KILL", "--kill-whom=main", AGENT])
        await asyncio.wait([asked])
        assert asked.exception() is not None
        await asyncio.to_thread(wait_online, guest, blocks)
    assert set(states(guest, set(blocks)).values()) == {("online", "Movable")}
    await asyncio.to_thread(guest.run, "until [ $(cat /run/ballast/leaving.json) = {} ]; do sleep 0.1; done")


async def test_what_does_not_leave_in_time_is_online_again_and_the_host_is_told(
    guest: Guest, vsock: str, token: str, blocks: list[int]
) -> None:
    async with Agent.connect(vsock, token) as agent:
        assert (await agent.memory_offline(dimm=ADDRESS)).dimms[0].offline
    # A minute that is nearly over, as the next agent finds it: nobody has to wait for all of it.
    await asyncio.to_thread(
        guest.run,
        f"systemctl stop {AGENT}; /usr/bin/python3 -c '{SHORTEN}'; systemctl start {AGENT}",
        timeout_s=DEADLINE_S,
    )
    async with Agent.connect(vsock, token) as agent:
        await agent.subscribe(["BALLAST_MEMORY_ADDED"])
        assert {state for state, _ in states(guest, set(blocks)).values()} == {"offline"}
        added = await hear(agent, "BALLAST_MEMORY_ADDED", len(blocks))
    (event,) = added
    assert [(one["phys-index"], one["zone"], one["result"]) for one in event.data["blocks"]] == [
        (block, "movable", "done") for block in sorted(blocks, reverse=True)
    ]
    assert set(states(guest, set(blocks)).values()) == {("online", "Movable")}


def test_used_dimms_come_and_go_and_no_page_is_changed(guest: Guest, measured: Callable[[str], None]) -> None:
    """A short run of the campaign (`python -m tests.vm.dimms` is the long one)."""
    campaign = Campaign(guest)
    try:
        reports = [campaign.run_round() for _ in range(ROUNDS)]
    finally:
        campaign.finish()
    measured(f"{ROUNDS} used DIMMs: {reports}")
