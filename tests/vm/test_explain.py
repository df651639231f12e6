"""What changed a real guest's memory is told to the host and written to its journal, with the numbers behind it."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from ballast.host.agent import Agent
from ballast.wire.memory_names import Decision
from tests.lab.guest import Guest
from tests.vm.test_memory import BLOCK_BYTES, dimm
from tests.vm.test_offline import wait_online
from tests.vm.unit import AGENT

CHUNK_BYTES = 64 << 20
HOLDER = "ballast-balloon.service"


@pytest.fixture
def now_ms(guest: Guest) -> int:
    """By the guest's clock."""
    return int(guest.run(["date", "+%s%3N"]).stdout)


@pytest_asyncio.fixture
async def agent(vsock: str, token: str) -> AsyncIterator[Agent]:
    async with Agent.connect(vsock, token) as connected:
        yield connected


async def since(agent: Agent, at_ms: int) -> list[Decision]:
    return [one for one in await agent.memory_explain() if one.at_ms >= at_ms]


def told(guest: Guest, at_ms: int) -> list[tuple[str, str, int]]:
    """What the journal has."""
    argv = ["journalctl", f"--unit={AGENT}", f"--since=@{at_ms / 1000}", "--output=json"]
    guest.run(["journalctl", "--sync"])
    lines = [json.loads(line) for line in guest.run(argv).stdout.splitlines()]
    wanted = ("BALLAST_CHANGE", "BALLAST_REASON", "BALLAST_BYTES")
    return [(line[wanted[0]], line[wanted[1]], int(line[wanted[2]])) for line in lines if wanted[0] in line]


async def test_a_dimm_that_came_and_went(guest: Guest, agent: Agent, now_ms: int) -> None:
    with dimm(guest, "dimm-explain", 2 * BLOCK_BYTES) as blocks:
        wait_online(guest, blocks)
        assert (await agent.memory_offline(bytes_=2 * BLOCK_BYTES)).dimms[0].offline
        decisions = await since(agent, now_ms)
    changes = [(one.change, one.reason, one.bytes) for one in decisions]
    assert [change for change in changes if change[0] != "onlined-movable"] == [("offlined", "asked", 2 * BLOCK_BYTES)]
    online = [one for one in decisions if one.change == "onlined-movable"]
    assert sum(one.bytes for one in online) == 2 * BLOCK_BYTES
    assert {one.reason for one in online} == {"zone-rule"}
    assert {"movable-bytes", "kernel-bytes"} <= online[0].numbers.keys()
    assert {"available-bytes", "floor-bytes"} <= decisions[-1].numbers.keys()
    assert told(guest, now_ms) == changes


async def test_a_balloon_that_grew_and_shrank_and_was_lost(guest: Guest, agent: Agent, now_ms: int) -> None:
    for _ in range(2):
        chunk = await agent.balloon_inflate(2 * CHUNK_BYTES)
        assert chunk.chunk is not None
        await agent.balloon_ack(chunk.chunk, 0)
    await agent.balloon_deflate(CHUNK_BYTES)
    guest.run(["systemctl", "kill", "--signal=KILL", HOLDER])
    guest.run(f"while systemctl is-active --quiet {HOLDER}; do sleep 0.1; done")
    await agent.balloon_ranges()  # whatever it says, by then the agent has heard
    decisions = await since(agent, now_ms)
    changes = [(one.change, one.reason, one.bytes) for one in decisions]
    assert changes == [
        ("inflated", "asked", CHUNK_BYTES),
        ("inflated", "asked", CHUNK_BYTES),
        ("deflated", "asked", CHUNK_BYTES),
        ("holder-lost", "killed", CHUNK_BYTES),
    ]
    assert {"target-bytes", "available-bytes", "room-bytes"} <= decisions[0].numbers.keys()
    assert told(guest, now_ms) == changes
