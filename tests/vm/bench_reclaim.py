"""Memory taken from a guest and given back: ours, virtio-balloon and virtio-mem, timed one at a time.

All of it was written before, and is free again when it is taken. Taking ends when the host has it: for a DIMM when
QEMU has no mapping of it any more, for a balloon or virtio-mem when QEMU says that the guest is that small. Giving
back ends when the guest can use it: all blocks are online, the balloon says that it is empty.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ballast.host.balloon import Inflation, Outcome
from ballast.host.dimms import read_dimms, remove_dimm
from ballast.host.qemu import Qemu
from ballast.host.qmp import Qmp
from ballast.host.reclaim import GRAIN_BYTES, Reclaim
from tests.vm.bench_hotadd import listening
from tests.vm.bench_machine import BLOCK_BYTES, GIB, MIB, BenchFailed, Machine, wait
from tests.vm.bench_memory_figures import BALLAST, VIRTIO_BALLOON, VIRTIO_MEM, Line

HOT_BYTES, BOOT_BYTES = GIB, 512 * MIB
DIMM = "dimm-reclaim"


def measure_hot(machine: Machine, contender: str) -> list[Line]:
    """1 GiB is plugged in, used, and taken away."""
    if contender == BALLAST:
        return _measure_dimm(machine)
    returned = _plug_virtio_mem(machine)
    machine.touch()
    if contender == VIRTIO_MEM:
        taken = _time(machine, "reclaim-hot", HOT_BYTES, lambda: machine.request_virtio_mem(0))
        lines = [taken, _line("return-hot", returned, HOT_BYTES)]
    else:
        # Which memory a balloon takes is the guest's affair; what can be moved comes first, and that is hot-added.
        lines = _measure_virtio_balloon(machine, "hot", HOT_BYTES)
        machine.request_virtio_mem(0)
    machine.let_kernel("offline")
    return lines


def measure_boot(machine: Machine, contender: str) -> list[Line]:
    """Boot memory is taken by a balloon, and given back. Our first grain starts the process that holds it."""
    if contender == VIRTIO_BALLOON:
        machine.touch()
        taken, returned = _measure_virtio_balloon(machine, "boot", BOOT_BYTES)
        return [taken, {**taken, "measure": "reclaim-boot-first"}, returned]
    with our_turn(machine):
        machine.touch()
        first_ms = 1000 * asyncio.run(inflate(machine, GRAIN_BYTES))
        target_bytes = GRAIN_BYTES + BOOT_BYTES
        taken = _time(machine, "reclaim-boot", BOOT_BYTES, lambda: asyncio.run(inflate(machine, target_bytes)))
        with_start = {**taken, "measure": "reclaim-boot-first", "ms": round(first_ms + taken["ms"], 3)}
        returned = _time(machine, "return-boot", target_bytes, lambda: asyncio.run(deflate(machine)))
    return [taken, with_start, returned]


# Ours


@contextmanager
def our_turn(machine: Machine) -> Iterator[None]:
    """The agent runs, and answers."""
    machine.start_agent()
    asyncio.run(_greet(machine))
    yield
    machine.stop_agent()


async def _greet(machine: Machine) -> None:
    async with machine.agent() as agent:
        await agent.memory_status()


async def inflate(machine: Machine, target_bytes: int) -> float:
    """As `ballastctl balloon set` does it; how long, in seconds."""
    async with machine.agent() as agent, Qemu.connect(str(machine.guest.qmp_path)) as qemu:
        from_s = time.monotonic()
        reclaim, outcome = Reclaim(agent, qemu), Outcome(target_bytes, 0)
        await reclaim.begin()
        await Inflation(reclaim, outcome, finish=_finish, advance=lambda _: None).run()
        took_s = time.monotonic() - from_s
    if outcome.total_bytes != target_bytes or outcome.not_zero_bytes:
        raise BenchFailed(f"the balloon does not come to its size: {outcome}")
    return took_s


async def _finish(step: Awaitable[None]) -> None:
    await step


async def deflate(machine: Machine) -> float:
    """Give all back; how long, in seconds."""
    async with machine.agent() as agent:
        from_s = time.monotonic()
        left_bytes = (await agent.balloon_deflate(0)).total_bytes
        took_s = time.monotonic() - from_s
    if left_bytes:
        raise BenchFailed(f"{left_bytes} bytes are left in the balloon")
    return took_s


def _measure_dimm(machine: Machine) -> list[Line]:
    guest = machine.guest
    with our_turn(machine):
        with listening(machine, HOT_BYTES // BLOCK_BYTES) as heard:
            guest.hot_add(HOT_BYTES, DIMM)
        machine.touch()
        taken = _time(machine, "reclaim-hot", HOT_BYTES, lambda: asyncio.run(_remove(machine)))
    guest.bury(HOT_BYTES)
    return [taken, _line("return-hot", heard.from_order_ms, HOT_BYTES)]


async def _remove(machine: Machine) -> float:
    """As `ballastctl memory remove` does it; how long, in seconds."""
    async with machine.agent() as agent, Qmp.connect(str(machine.guest.qmp_path)) as qmp:
        files = len(machine.files())
        from_s = time.monotonic()
        (dimm,) = await read_dimms(qmp)
        removal = await remove_dimm(agent, qmp, dimm)
        if removal.result == "removed":
            await asyncio.to_thread(wait, lambda: len(machine.files()) < files)
        took_s = time.monotonic() - from_s
    if removal.result != "removed" or removal.reason:
        raise BenchFailed(f"the DIMM does not come off: {removal.reason}")
    return took_s


# Its peers'


def _plug_virtio_mem(machine: Machine) -> float:
    """Have it plug all it has; how long until all is online, in milliseconds."""
    machine.let_kernel("online_movable")
    with listening(machine, HOT_BYTES // BLOCK_BYTES) as heard:
        machine.request_virtio_mem(HOT_BYTES)
    return heard.from_order_ms


def _measure_virtio_balloon(machine: Machine, where: str, bytes_: int) -> list[Line]:
    whole_bytes = machine.size_bytes()
    return [
        _time(machine, f"reclaim-{where}", bytes_, lambda: machine.order_balloon(whole_bytes - bytes_)),
        _time(machine, f"return-{where}", bytes_, lambda: machine.order_balloon(whole_bytes)),
    ]


def _time(machine: Machine, measure: str, bytes_: int, act: Callable[[], float | None]) -> Line:
    """Do it, and see what it brought the host. ``act`` may say itself how many seconds it took."""
    before_bytes, from_s = machine.used_bytes(), time.monotonic()
    told_s = act()
    took_s = time.monotonic() - from_s if told_s is None else told_s
    use = [round(before_bytes / MIB, 1), round(machine.used_bytes() / MIB, 1)]
    return {**_line(measure, 1000 * took_s, bytes_), "host_mib": use}


def _line(measure: str, took_ms: float, bytes_: int) -> dict[str, Any]:
    return {"measure": measure, "ms": round(took_ms, 3), "mib": bytes_ // MIB}
