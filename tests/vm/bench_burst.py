"""A burst of allocation, until the guest has the first new block: the agent tells of the pressure, the host plugs in.

The burst is the demo's load (tests/lab/demo_load.py): all memory but a little is taken, and more file pages are read
than find room. It writes down how long tasks have waited; the first wait of STALL_US is where the time begins, the
first block's "online" is where it ends. Both contenders hear the same event; the blocks are brought online by our
agent, or by the kernel itself.
"""

from __future__ import annotations

import asyncio

from tests.lab.demo_memory import EVENT_TIMEOUT_S, LOG, TRIGGER, Ear, Sample, read_samples, start_load, stop_load
from tests.vm.bench_hotadd import Heard, listening, plug, unplug
from tests.vm.bench_machine import BenchFailed, Machine
from tests.vm.bench_memory_figures import KERNEL, Line
from tests.vm.bench_reclaim import our_turn

BLOCKS = 8
STALL_US = 10_000


def measure_burst(machine: Machine, contender: str) -> list[Line]:
    """One burst, and one DIMM for it."""
    machine.guest.run(["rm", "-f", LOG])  # of the burst before
    if contender == KERNEL:
        machine.let_kernel("online_movable")
    with our_turn(machine):
        try:
            heard = asyncio.run(_relieve(machine))
            samples = read_samples(machine.guest)
        finally:
            stop_load(machine.guest)
    machine.let_kernel("offline")
    unplug(machine, BLOCKS)
    stalled_s = heard.on_host(_first_stall_s(samples))
    event_ms, ms = 1000 * (heard.ordered_s - stalled_s), 1000 * (heard.online_s[0] - stalled_s)
    return [{"measure": "burst", "ms": round(ms, 3), "event_ms": round(event_ms, 3)}]


async def _relieve(machine: Machine) -> Heard:
    """What a host's loop does; it ends when all of the DIMM is online."""
    async with machine.agent() as agent:
        with listening(machine, BLOCKS) as heard:
            await agent.subscribe(events=["BALLAST_PRESSURE"], psi=[TRIGGER])
            await asyncio.to_thread(start_load, machine.guest)
            await Ear(agent).next("BALLAST_PRESSURE", EVENT_TIMEOUT_S)
            heard.order_now()
            plug(machine, BLOCKS)
    return heard


def _first_stall_s(samples: list[Sample]) -> float:
    """By the guest's clock."""
    first_us = samples[0][1]
    for at_s, total_us in samples:
        if total_us - first_us >= STALL_US:
            return at_s
    raise BenchFailed("an event, and nobody has waited")
