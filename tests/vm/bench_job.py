"""What a program notices of memory that is taken from its guest and given back meanwhile, and what the host has of it.

The program (bench_work.py) does a fixed amount of work on memory of its own. While it runs, 768 MiB of what is free are
taken, kept until HELD_S after its beginning, and given back. The time is the program's; the host's use is summed up
over that time, in GiB times minutes.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from tests.lab.guest import Guest, Result
from tests.vm.bench_machine import GIB, MIB, TIMEOUT_S, Machine
from tests.vm.bench_memory_figures import BALLAST, VIRTIO_BALLOON, Line
from tests.vm.bench_reclaim import deflate, inflate, our_turn

PROGRAM = "/run/bench-work.py"
ROUNDS, WORK_BYTES = 30, 256 * MIB
TAKEN_BYTES = 768 * MIB
HELD_S = 6.0
SAMPLE_S = 0.1


def measure_job(machine: Machine, contender: str) -> list[Line]:
    """The program runs once."""
    machine.guest.put(PROGRAM, Path(__file__).with_name("bench_work.py").read_bytes())
    if contender == BALLAST:
        with our_turn(machine):
            return [_measure(machine, contender)]
    return [_measure(machine, contender)]


def _measure(machine: Machine, contender: str) -> Line:
    machine.touch()
    whole_bytes = machine.size_bytes()
    with _summed_up(machine) as use, _working(machine.guest) as program:
        from_s = time.monotonic()
        if contender == BALLAST:
            asyncio.run(inflate(machine, TAKEN_BYTES))
        elif contender == VIRTIO_BALLOON:
            machine.order_balloon(whole_bytes - TAKEN_BYTES)
        time.sleep(max(0.0, from_s + HELD_S - time.monotonic()))
        if contender == BALLAST:
            asyncio.run(deflate(machine))
        elif contender == VIRTIO_BALLOON:
            machine.order_balloon(whole_bytes)
        told = json.loads(program.result().stdout)
    took_s = told["ended-s"] - told["started-s"]
    return {"measure": "job", "ms": round(1000 * took_s, 3), "host_gib_min": round(sum(use) / GIB / 60, 5)}


@contextmanager
def _working(guest: Guest) -> Iterator[Future[Result]]:
    """The program, from its start to its end."""
    with ThreadPoolExecutor(1) as pool:
        program = ["/usr/bin/python3", "-IB", PROGRAM, str(ROUNDS), str(WORK_BYTES)]
        yield pool.submit(guest.run, program, timeout_s=TIMEOUT_S)


@contextmanager
def _summed_up(machine: Machine) -> Iterator[list[float]]:
    """What the host has for the guest in the time of the block, in byte seconds, as a list of summands."""
    summands: list[float] = []
    is_over = threading.Event()

    def sample() -> None:
        last_s = time.monotonic()
        while not is_over.wait(SAMPLE_S):
            now_s = time.monotonic()
            summands.append(machine.used_bytes() * (now_s - last_s))
            last_s = now_s

    with ThreadPoolExecutor(1) as pool:
        sampler = pool.submit(sample)
        try:
            yield summands
        finally:
            is_over.set()
            sampler.result()
