"""The balloon in a guest that has other things to do."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

import pytest_asyncio

from ballast.host.agent import Agent
from tests.lab.guest import Guest

LOAD_S = 6
LOAD = f"stress-ng --vm 1 --vm-bytes 450M --vm-method write64 --vm-keep --timeout {LOAD_S} --no-oom-adjust --oomable"


@pytest_asyncio.fixture
async def agent(vsock: str, token: str) -> AsyncIterator[Agent]:
    async with Agent.connect(vsock, token=token) as connected:
        yield connected
        await connected.balloon_deflate(0)


async def inflate(agent: Agent, target_bytes: int, enough_bytes: int) -> int:
    """Take chunk after chunk, until the target or the guest's floor; what it has in the end.

    Whatever ran before may have made the balloon give way, and then it takes nothing for ten seconds.
    """
    async with asyncio.timeout(90):
        while True:
            reply = await agent.balloon_inflate(target_bytes)
            if reply.chunk is not None:
                await agent.balloon_ack(reply.chunk, 0)
            if reply.done or (reply.floor and reply.total_bytes >= enough_bytes):
                return reply.total_bytes
            if reply.floor:
                await asyncio.sleep(0.5)


async def test_half_of_the_memory_is_given_back_to_a_program_that_needs_it(
    guest: Guest, agent: Agent, measured: Callable[[str], None]
) -> None:
    total_bytes = (await agent.memory_status()).total_bytes
    taken_bytes = await inflate(agent, total_bytes // 2, total_bytes * 45 // 100)
    await agent.subscribe(["BALLAST_BALLOON"])
    guest.run("dmesg -C")
    ran = await asyncio.to_thread(guest.run, LOAD, timeout_s=120)
    assert "passed: 1" in ran.stdout + ran.stderr
    kills = guest.run("dmesg | grep 'Killed process' || true").stdout.splitlines()
    causes = [event.data["cause"] for event in agent.take_events()]
    left_bytes = (await agent.memory_status()).balloon.bytes
    measured(f"{taken_bytes >> 20} MiB in the balloon, a load of 450 MiB: {left_bytes >> 20} left, {causes}, {kills}")
    assert left_bytes < taken_bytes
    assert set(causes) <= {"pressure", "holder-lost"}
    assert causes
    # If all else fails the kernel takes the holder, and nobody but the holder.
    assert all("(ballast-balloon)" in line for line in kills)
