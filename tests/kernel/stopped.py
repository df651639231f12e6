"""A QEMU that never runs its guest (-S): real memory, a real address map, started in a fraction of a second."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
from collections.abc import AsyncIterator, Collection, Iterator
from pathlib import Path

from ballast.host.connect import PeerGone
from ballast.host.machine import MemoryMap, Region
from ballast.host.qemu import Qemu
from tests.lab import qemu

DEADLINE_S = 60.0
MIB = 1 << 20


def memory(size_mib: int, options: str = "share=on", kind: str = "memfd") -> list[str]:
    """Boot memory with a back end of its own; the machine's options need memory-backend=ram."""
    backend = f"memory-backend-{kind},id=ram,size={size_mib}M,{options}"
    return ["-m", f"size={size_mib}M,slots=4,maxmem=16G", "-object", backend]


def dimm(name: str, size_mib: int) -> list[str]:
    """A DIMM that is there from the start."""
    backend = f"memory-backend-memfd,id=memory-{name},size={size_mib}M,share=on"
    return ["-object", backend, "-device", f"pc-dimm,id={name},memdev=memory-{name}"]


@contextlib.contextmanager
def started(folder: Path, *arguments: str) -> Iterator[Path]:
    """QEMU with these arguments; yields the path of its QMP socket, which may not be there yet."""
    path = folder / "qmp.sock"
    argv = ["qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none", "-S"]
    argv += ["-accel", "tcg,tb-size=16"]  # nothing is translated
    process = qemu.start([*argv, "-qmp", f"unix:{path},server=on,wait=off", *arguments], folder / "qemu.log")
    try:
        yield path
    finally:
        process.kill()
        process.wait()


@contextlib.asynccontextmanager
async def stopped(folder: Path, *arguments: str, safe: Collection[str] = ()) -> AsyncIterator[Qemu]:
    """QEMU with these arguments, connected as the product does it."""
    with started(folder, *arguments) as path:
        async with connected(path, safe) as machine:
            yield machine


@contextlib.asynccontextmanager
async def connected(path: Path, safe: Collection[str] = ()) -> AsyncIterator[Qemu]:
    """Connect as soon as QEMU listens."""
    async with contextlib.AsyncExitStack() as stack:
        yield await _connect(stack, path, safe)


async def _connect(stack: contextlib.AsyncExitStack, path: Path, safe: Collection[str]) -> Qemu:
    async with asyncio.timeout(DEADLINE_S):
        while True:
            try:
                return await stack.enter_async_context(Qemu.connect(str(path), safe))
            except PeerGone:
                await asyncio.sleep(0.02)


async def read_physical(machine: Qemu, address: int) -> bytes:
    """Sixteen bytes of the guest's physical memory, as QEMU reads them."""
    text = await machine.qmp.ask_monitor(f"xp /16xb {address:#x}")
    return bytes(int(word, 16) for word in re.findall(r"0x([0-9a-f]{2})\b", text))


def fill(region: Region, *, zero: Collection[range] = ()) -> None:
    """Random data into all of a region, but zeros, which are written too, at these offsets of the file."""
    for offset in range(region.offset, region.offset + region.bytes, MIB):
        is_zero = any(offset in one for one in zero)
        os.pwrite(region.fd, bytes(MIB) if is_zero else os.urandom(MIB), offset)


def contents(memory_map: MemoryMap) -> list[bytes]:
    """All that is in the memory, region by region."""
    return [os.pread(one.fd, one.bytes, one.offset) for one in memory_map.regions]
