"""A guest whose memory lies on both sides of 4 GiB, with agent and checker; and a host that has its balloon in hand."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterator

from ballast.host.agent import Agent
from ballast.host.balloon import Inflation, Outcome
from ballast.host.qemu import Qemu
from ballast.host.reclaim import Reclaim
from tests.lab.guest import Guest
from tests.lab.image import build
from tests.vm.balloon_faults import CHECKER, IN_GUEST, order, start_checker
from tests.vm.conftest import TOKEN, packages

MIB = 1 << 20
PAGE_BYTES = 4096
HIGH = 4 << 30
MEMORY_BYTES, DIMM_BYTES, BLOCK_BYTES = 1 << 30, 256 * MIB, 128 * MIB
# A quarter of it above 4 GiB: the balloon has to take from both sides.
MACHINE = "max-ram-below-4g=768M"
# What the checker leaves free of all memory.
LEFT_MIB = 64
DROP_ALL = f"drop {MEMORY_BYTES}"
# Of each of a process's own mappings, of so many KiB at least, where the page in the middle is. Memory is short there.
_FRAMES = """
import struct, sys
pid, least = sys.argv[1], int(sys.argv[2]) * 1024
for line in open(f"/proc/{pid}/maps"):
    span, modes, _, device, *_ = line.split()
    start, end = (int(part, 16) for part in span.split("-"))
    if modes == "rw-p" and device == "00:00" and end - start >= least:
        with open(f"/proc/{pid}/pagemap", "rb", 0) as pagemap:
            pagemap.seek((start + end) // 2 // 4096 * 8)
            (entry,) = struct.unpack("Q", pagemap.read(8))
        if entry >> 63:
            print((entry & (1 << 55) - 1) * 4096)
"""
_SICK = "dmesg | grep -E 'BUG|Oops|Bad page|general protection|segfault' || true"


class TrialFailed(Exception):
    """The balloon did not do what it is for."""


@contextlib.contextmanager
def boot(suite: str) -> Iterator[Guest]:
    """A guest whose memory is parted, with agent and checker."""
    with Guest(build(suite), token=TOKEN, memory_bytes=MEMORY_BYTES, machine=MACHINE) as guest:
        guest.wait_boot()
        guest.install(packages())
        guest.put(IN_GUEST, CHECKER.read_bytes())
        start_checker(guest)
        yield guest


@contextlib.asynccontextmanager
async def host(guest: Guest) -> AsyncIterator[tuple[Agent, Qemu, Reclaim]]:
    """What ballastctl has in hand."""
    async with (
        Agent.connect(f"unix:{guest.vsock_path}?connect=640", TOKEN, timeout_s=60) as agent,
        Qemu.connect(str(guest.qmp_path), ["vsock"]) as machine,
    ):
        reclaim = Reclaim(agent, machine)
        await reclaim.begin()
        try:
            yield agent, machine, reclaim
        finally:
            await reclaim.deflate(0)


async def inflate(reclaim: Reclaim, target_bytes: int, least: float = 1.0) -> Outcome:
    """Up to so much of the target, also just after the guest gave way; TrialFailed if it does not get there."""
    deadline_s = time.monotonic() + 60
    while True:
        outcome = Outcome(target_bytes, 0)
        await Inflation(reclaim, outcome, finish=lambda step: step, advance=lambda _: None).run()
        if outcome.total_bytes >= least * target_bytes:
            return outcome
        if time.monotonic() > deadline_s:
            raise TrialFailed(f"the balloon does not come to its size: {outcome}")
        await asyncio.sleep(1)


def check(guest: Guest) -> int:
    """Look at all that the checker holds, and at the kernel's log; how many pages."""
    checked = order(guest, "check")
    if checked["bad"]:
        raise TrialFailed(f"pages have changed: {checked['bad']}")
    if sick := guest.run(_SICK).stdout:
        raise TrialFailed(f"the guest's kernel complains: {sick}")
    return int(checked["pages"])


def page_of(guest: Guest, process: str, least_kib: int = 0) -> int:
    """Where a page is that a process has in its own memory, in a mapping of that size."""
    said = guest.run(["/usr/bin/python3", "-c", _FRAMES, process, str(least_kib)], timeout_s=60)
    return int(said.stdout.split()[0])


def held_page(guest: Guest) -> int:
    """One that the checker has filled; it has no other mapping of that size."""
    return page_of(guest, guest.run(["pgrep", "-of", IN_GUEST]).stdout.strip(), least_kib=64 << 10)
