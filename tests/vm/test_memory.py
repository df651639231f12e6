"""Memory in a real guest: pressure is told; hot-added blocks come online, in the right zone, and stay as they were put.

The load is the demo's: programs that want more pages than there are, and that the OOM killer has no reason to end.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

import pytest

from ballast.host.agent import Agent
from ballast.host.qga import MemoryBlock
from ballast.wire.errors import BadRequest
from ballast.wire.message import Event
from tests.lab import demo_memory as demo
from tests.lab.demo_stage import read_clock
from tests.lab.guest import Guest
from tests.vm.unit import AGENT, configured

GIB = 1 << 30
BLOCK_BYTES = 128 << 20
DEADLINE_S = 60.0
DELAY_S = 2.0
SYSFS = "/sys/devices/system/memory"
MANUAL = "[memory]\nonline = false\n"

# Stamps what the kernel says of memory blocks, until so many have been added and are online.
WITNESS = """
import ctypes, json, os, socket, sys, time
NETLINK_KOBJECT_UEVENT, SO_RCVBUFFORCE = 15, 33
ctypes.CDLL(None).mlockall(3)
os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(10))
uevents = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_KOBJECT_UEVENT)
uevents.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 8 << 20)
uevents.bind((0, 1))
print("ready", flush=True)
stamps_s = {"add": {}, "online": {}}
while len(stamps_s["online"].keys() & stamps_s["add"].keys()) < int(sys.argv[1]):
    text = uevents.recv(65536)
    now_s = time.monotonic()
    action, _, path = text.split(b"\\0")[0].decode().partition("@")
    if action in stamps_s and "/memory/memory" in path:
        stamps_s[action][int(path.rpartition("/memory")[2])] = now_s
print(json.dumps(stamps_s))
"""
SAID = "/run/witness.said"

PIPES = """
import fcntl, os, time
pipes = [os.pipe() for _ in range(32)]
for reader, writer in pipes:
    os.write(writer, bytes(fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 1 << 20)))
print("full", flush=True)
time.sleep(600)
"""


@pytest.fixture
def load(guest: Guest) -> Iterator[Callable[[], None]]:
    """Starts the load; at the end it must still run, and nobody may have been killed for memory."""
    with ExitStack() as started:

        def start() -> None:
            demo.start_load(guest)
            started.callback(guest.run, f"rm {demo.LOG} {demo.PROGRAM}")
            started.callback(demo.stop_load, guest)

        yield start


@contextmanager
def witness(guest: Guest, count: int) -> Iterator[Future[str]]:
    """The witness, hearing; the future is what it says when it has seen so many blocks."""
    with ThreadPoolExecutor(1) as threads:
        program = ["/bin/bash", "-ec", f'exec /usr/bin/python3 -c "$0" {count} >{SAID}', WITNESS]
        guest.run(["rm", "-f", SAID])
        running = threads.submit(guest.run, program, timeout_s=2 * DEADLINE_S)
        guest.run(f"until grep -qs ready {SAID}; do sleep 0.05; done")

        def read() -> str:
            running.result()
            return guest.get(SAID).decode().removeprefix("ready\n")

        yield threads.submit(read)


def indexes(guest: Guest) -> set[int]:
    """The memory blocks that are there, by sysfs."""
    return {int(path.rpartition("/memory")[2]) for path in guest.run(f"ls -d {SYSFS}/memory*").stdout.split()}


def states(guest: Guest, blocks: set[int]) -> dict[int, tuple[str, str]]:
    """State and zone of blocks, by sysfs."""
    said = guest.run("\n".join(f"echo $(cat {SYSFS}/memory{one}/{{state,valid_zones}})" for one in sorted(blocks)))
    lines = (line.split() for line in said.stdout.splitlines())
    return dict(zip(sorted(blocks), ((line[0], line[1]) for line in lines), strict=True))


def lsmem(guest: Guest) -> dict[int, str]:
    """State of all blocks, by lsmem(1)."""
    said = guest.run(["lsmem", "--all", "--raw", "--noheadings", "--output=block,state"]).stdout
    return {int(block): state for block, state in (line.split() for line in said.splitlines())}


@contextmanager
def kernel_pages(guest: Guest) -> Iterator[None]:
    """A process with full pipes: 32 MiB that the kernel cannot move, in the kernel's zone with the highest address."""
    said = "/run/lab-pipes"
    guest.run(
        ["/bin/bash", "-ec", f'setsid /usr/bin/python3 -c "$0" >{said} 2>&1 </dev/null & echo $! >{said}.pid', PIPES]
    )
    guest.run(f"until grep -qx full {said}; do sleep 0.1; done")
    try:
        yield
    finally:
        guest.run(f"kill $(cat {said}.pid); rm {said} {said}.pid")


def plug_in(guest: Guest, name: str, bytes_: int) -> set[int]:
    """A DIMM; returns its blocks."""
    before = indexes(guest)
    guest.hot_add(bytes_, name)
    blocks: set[int] = set()
    deadline_s = time.monotonic() + DEADLINE_S
    while len(blocks) < bytes_ // BLOCK_BYTES:
        assert time.monotonic() < deadline_s
        blocks = indexes(guest) - before
    return blocks


@contextmanager
def dimm(guest: Guest, name: str, bytes_: int) -> Iterator[set[int]]:
    """A DIMM, its blocks, and then neither any more."""
    blocks = plug_in(guest, name, bytes_)
    try:
        yield blocks
    finally:
        unplug(guest, name, blocks)


def unplug(guest: Guest, name: str, blocks: set[int]) -> None:
    """Offline all blocks, as often as pages in them are still in use, and take the DIMM out."""
    offline = " && ".join(f"offline {one}" for one in sorted(blocks))
    state = f"{SYSFS}/memory$1/state"
    guest.run(
        f"offline() {{ grep -q offline {state} || echo offline >{state}; }}; until {offline}; do sleep 0.2; done",
        timeout_s=DEADLINE_S,
    )
    guest.unplug(name, len(blocks) * BLOCK_BYTES)


async def hear(agent: Agent, name: str, count: int) -> list[Event]:
    """Events of that name, until they have told of so many blocks."""
    heard: list[Event] = []
    async with asyncio.timeout(DEADLINE_S):
        async for event in agent.events():
            if event.name == name:
                heard.append(event)
            if sum(len(one.data["blocks"]) for one in heard) >= count:
                return heard
    raise AssertionError(heard)


async def test_pressure_is_told_soon_after_the_kernel_counts_it(
    guest: Guest, vsock: str, token: str, load: Callable[[], None], measured: Callable[[str], None]
) -> None:
    clock = read_clock(guest)
    async with Agent.connect(vsock, token) as agent:
        await agent.subscribe(["BALLAST_PRESSURE"], psi=[demo.TRIGGER])
        await asyncio.to_thread(load)
        async with asyncio.timeout(DEADLINE_S):
            event = await anext(agent.events())
        here_s = clock.ahead_s + time.time()
    assert (event.data["kind"], event.data["stall-us"]) == (demo.TRIGGER.kind, demo.TRIGGER.stall_us)
    assert event.data["level"] in ("medium", "critical")
    stalled_s = demo.first_crossing_s(await asyncio.to_thread(demo.read_samples, guest), demo.TRIGGER)
    made_s = event.timestamp_us / 1e6 - stalled_s
    measured(f"BALLAST_PRESSURE: made {made_s:.3f} s after the stall, on the host after {here_s - stalled_s:.3f} s")
    assert -DELAY_S < made_s <= here_s - stalled_s + clock.error_s < DELAY_S


async def test_blocks_hot_added_under_pressure_are_online_in_time(
    guest: Guest, vsock: str, token: str, load: Callable[[], None], measured: Callable[[str], None]
) -> None:
    count = GIB // BLOCK_BYTES
    async with Agent.connect(vsock, token) as agent, Agent.connect(vsock, token) as other:
        with witness(guest, count) as said:
            await other.subscribe(["BALLAST_PRESSURE"], psi=[demo.TRIGGER])
            await asyncio.to_thread(load)
            async with asyncio.timeout(DEADLINE_S):
                await anext(other.events())
            await agent.subscribe(["BALLAST_MEMORY_ADDED", "BALLAST_MEMORY_REMOVED"])
            with dimm(guest, "dimm-pressed", GIB) as blocks:
                added = await hear(agent, "BALLAST_MEMORY_ADDED", count)
                stamps_s = json.loads(await asyncio.to_thread(said.result))
                assert set(states(guest, blocks).values()) == {("online", "Movable")}
            removed = await hear(agent, "BALLAST_MEMORY_REMOVED", count)
    told = [block for event in added for block in event.data["blocks"]]
    assert {(one["phys-index"], one["zone"], one["result"]) for one in told} == {(n, "movable", "done") for n in blocks}
    assert {one["phys-index"] for event in removed for one in event.data["blocks"]} == blocks
    took_s = {int(name): stamps_s["online"][name] - added_s for name, added_s in stamps_s["add"].items()}
    measured(f"{count} blocks under pressure: online {min(took_s.values()):.3f} to {max(took_s.values()):.3f} s after")
    assert took_s.keys() == blocks
    assert max(took_s.values()) < DELAY_S


@pytest.fixture
def manual(guest: Guest) -> Iterator[set[int]]:
    """The blocks of a DIMM that the agent does not online by itself."""
    with configured(guest, MANUAL), dimm(guest, "dimm-manual", GIB) as blocks:
        yield blocks


async def test_blocks_are_onlined_by_bytes_by_number_and_by_zone(guest: Guest, serial: str, manual: set[int]) -> None:
    def online() -> set[int]:
        return {one for one, state in states(guest, manual).items() if state[0] == "online"}

    first, second, third, fourth, *rest = sorted(manual)
    async with Agent.connect(serial) as agent:
        assert online() == set()
        for bytes_ in (0, BLOCK_BYTES - 1):
            assert (await agent.memory_online(bytes_=bytes_)).blocks == []
        done = await agent.memory_online(bytes_=3 * BLOCK_BYTES - 1)
        assert (done.bytes, [one.phys_index for one in done.blocks]) == (2 * BLOCK_BYTES, [first, second])
        done = await agent.memory_online(blocks=[fourth, first], zone="movable")
        assert [(one.phys_index, one.result) for one in done.blocks] == [(fourth, "done"), (first, "already")]
        for unknown in ([third, 9999], [-1]):
            with pytest.raises(BadRequest, match="names no memory block"):
                await agent.memory_online(blocks=unknown)
        assert online() == {first, second, fourth}
        done = await agent.memory_online()
        assert [(one.phys_index, one.zone) for one in done.blocks] == [(n, "movable") for n in (third, *rest)]
    assert set(states(guest, manual).values()) == {("online", "Movable")}


async def test_qgas_commands_take_blocks_offline_and_online_as_lsmem_sees_them(
    guest: Guest, serial: str, manual: set[int]
) -> None:
    async with Agent.connect(serial) as agent:
        await agent.memory_online()
        block = max(manual)
        for wanted, word in itertools.product((False, True), ("success", "success")):
            (result,) = await agent.guest_set_memory_blocks([MemoryBlock(block, online=wanted)])
            assert (result.response, result.error_code) == (word, None)
            state = {one.phys_index: one.online for one in await agent.guest_get_memory_blocks()}
            assert state == {one: said == "online" for one, said in lsmem(guest).items()}
            assert state[block] is wanted
        # By the zone rule again, although the kernel would have put the last block of a range elsewhere.
        assert set(states(guest, manual).values()) == {("online", "Movable")}
        (result,) = await agent.guest_set_memory_blocks([MemoryBlock(9999, online=True)])
        assert result.response == "not-found"
        assert (await agent.guest_get_memory_block_info()).size == BLOCK_BYTES


async def test_what_somebody_took_offline_stays_offline_over_a_restart(guest: Guest, vsock: str, token: str) -> None:
    async with Agent.connect(vsock, token) as agent:
        await agent.subscribe(["BALLAST_MEMORY_ADDED"])
        with dimm(guest, "dimm-left", GIB) as blocks:
            await hear(agent, "BALLAST_MEMORY_ADDED", len(blocks))
            by_us, by_hand, unheard, *_ = sorted(blocks)
            await agent.guest_set_memory_blocks([MemoryBlock(by_us, online=False)])
            guest.run(f"echo offline >{SYSFS}/memory{by_hand}/state")
            # Nobody hears of this one, so it is what the new agent begins with; when that is done, all is.
            guest.run(f"systemctl stop {AGENT}; echo offline >{SYSFS}/memory{unheard}/state; systemctl start {AGENT}")
            guest.run(f"until grep -q online {SYSFS}/memory{unheard}/state; do sleep 0.1; done")
            left = {one for one, state in states(guest, blocks).items() if state[0] == "offline"}
            assert left == {by_us, by_hand}


async def test_a_dimm_goes_to_one_zone_and_movable_memory_stays_within_three_times_the_rest(
    guest: Guest, vsock: str, token: str
) -> None:
    """Keep this the last: what is in the kernel's zone holds the kernel's data at once, and stays in the guest."""
    async with Agent.connect(vsock, token) as agent:
        await agent.subscribe(["BALLAST_MEMORY_ADDED"])
        # Boot memory is a little less than 1 GiB, and so is what may be movable less than 3.
        with dimm(guest, "dimm-within", 23 * BLOCK_BYTES) as within:
            await hear(agent, "BALLAST_MEMORY_ADDED", len(within))
            beyond = plug_in(guest, "dimm-beyond", 2 * BLOCK_BYTES)
            added = await hear(agent, "BALLAST_MEMORY_ADDED", len(beyond))
            assert {one["zone"] for event in added for one in event.data["blocks"]} == {"kernel"}
            assert set(states(guest, beyond).values()) == {("online", "Normal")}
            assert set(states(guest, within).values()) == {("online", "Movable")}
            with kernel_pages(guest):
                result = await agent.memory_offline(dimm=min(beyond) * BLOCK_BYTES, timeout_ms=5000)
            causes = [one for one in result.blocks if one.reason not in ("undone", "not-tried")]
            assert [(one.result, one.reason) for one in causes] in ([("failed", "EBUSY")], [("failed", "deadline")])
            assert set(states(guest, beyond).values()) == {("online", "Normal")}
