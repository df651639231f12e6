"""What a real guest says that it needs: without the balloon, whatever the kernel counts it as, and swapped or not."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator

import pytest
import pytest_asyncio

from ballast.host.agent import Agent
from tests.lab.guest import Guest
from tests.lab.shortage import held, swap, swap_out
from tests.vm.test_balloon import inflate

MIB = 1 << 20
SLACK_BYTES = 40 * MIB
TAKEN_BYTES = 192 * MIB


@pytest_asyncio.fixture
async def agent(vsock: str, token: str) -> AsyncIterator[Agent]:
    async with Agent.connect(vsock, token=token) as connected:
        yield connected
        await connected.balloon_deflate(0)


@pytest.fixture(params=[0, 2])
def overcommit(guest: Guest, request: pytest.FixtureRequest) -> Iterator[int]:
    """vm.overcommit_memory, from before the holder's start; with room enough for mode 2."""
    guest.run(f"sysctl -q vm.overcommit_ratio=100 vm.overcommit_memory={request.param}")
    yield request.param
    guest.run("sysctl -q vm.overcommit_memory=0 vm.overcommit_ratio=50")


async def test_the_balloon_is_no_demand_though_its_pages_are_used_and_may_be_promised(
    guest: Guest, agent: Agent, overcommit: int, measured: Callable[[str], None]
) -> None:
    await agent.balloon_deflate(0)
    before = await agent.memory_status()
    await inflate(agent, TAKEN_BYTES, TAKEN_BYTES)
    after = await agent.memory_status()
    assert after.balloon.bytes == TAKEN_BYTES
    assert after.available_bytes < before.available_bytes - TAKEN_BYTES + SLACK_BYTES
    promised_bytes = after.committed_bytes - before.committed_bytes
    assert (promised_bytes > TAKEN_BYTES // 2) is (overcommit == 2)
    lasting = ("unreclaimable", "swapped", "promised")
    moved = {name: abs(after.demand[name] - before.demand[name]) for name in lasting}
    measured(
        f"overcommit {overcommit}: {TAKEN_BYTES // MIB} MiB of balloon, Committed_AS {promised_bytes // MIB} MiB more, "
        f"demand's parts moved by {', '.join(f'{name} {bytes_ // MIB}' for name, bytes_ in moved.items())} MiB"
    )
    assert max(moved.values()) < SLACK_BYTES
    assert before.lru is not None
    assert after.lru is not None
    assert abs(after.lru.active_anon_bytes - before.lru.active_anon_bytes) < SLACK_BYTES
    assert abs(after.lru.inactive_anon_bytes - before.lru.inactive_anon_bytes) < SLACK_BYTES


async def test_what_is_swapped_out_is_needed_as_much(
    guest: Guest, agent: Agent, measured: Callable[[str], None]
) -> None:
    with swap(guest), held(guest):
        before = await agent.memory_status()
        await asyncio.to_thread(swap_out, guest)
        after = await agent.memory_status()
    out_bytes = before.swap_free_bytes - after.swap_free_bytes
    measured(
        f"{out_bytes // MIB} MiB swapped out: unreclaimable {before.demand['unreclaimable'] // MIB} -> "
        f"{after.demand['unreclaimable'] // MIB} MiB, demand {before.demand_bytes // MIB} -> "
        f"{after.demand_bytes // MIB} MiB"
    )
    assert out_bytes > 60 * MIB
    assert after.demand["unreclaimable"] < before.demand["unreclaimable"] - out_bytes // 2
    assert after.demand_bytes > before.demand_bytes - SLACK_BYTES
