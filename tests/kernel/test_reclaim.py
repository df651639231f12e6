"""Where a guest's memory is on the host, and that punching it loses nothing: against real QEMUs that never run."""

from __future__ import annotations

import asyncio
import os
import random
from pathlib import Path

import pytest

from ballast.host import linux, qmp
from ballast.host.connect import NoAnswer
from ballast.host.machine import MemoryMap, NotReclaimable, Piece, QmpFailed, Region, WrongRanges
from ballast.host.qemu import Qemu
from ballast.host.reclaim import GRAIN_BYTES, Released, release
from tests.kernel import stopped
from tests.kernel.stopped import MIB, connected, contents, dimm, fill, memory

GIB = 1 << 30
HOLE_END = 4 * GIB
TMPFS = Path("/dev", "shm")
NODES = [
    *("-m", "1G,slots=4,maxmem=16G", "-object", "memory-backend-memfd,id=a,size=512M,share=on"),
    *("-object", "memory-backend-memfd,id=b,size=512M,share=on", "-numa", "node,memdev=a", "-numa", "node,memdev=b"),
]
VIRTIO_MEM = [
    *("-object", "memory-backend-memfd,id=vm,size=128M,share=on"),
    *("-device", "virtio-mem-pci,id=vm0,memdev=vm,requested-size=128M"),
]
# A small guest with memory on both sides of the hole below 4 GiB, and a DIMM after it.
SMALL = ["-machine", "q35,memory-backend=ram,max-ram-below-4g=64M", *memory(128), *dimm("dimm0", 64)]
# What it has, without the first MiB: [address, bytes].
SMALL_RAM = [[MIB, 63 * MIB], [HOLE_END, 64 * MIB], [HOLE_END + GIB, 64 * MIB]]


def ends(memory_map: MemoryMap) -> list[list[int]]:
    """Address and size of each region, neighbours of one file not joined."""
    return [[one.address, one.bytes] for one in memory_map.regions]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["-machine", "q35,memory-backend=ram", *memory(1024)], [[MIB, GIB - MIB]]),
        (["-machine", "q35,memory-backend=ram", *memory(5120)], [[MIB, 2 * GIB - MIB], [HOLE_END, 3 * GIB]]),
        (["-machine", "pc,memory-backend=ram", *memory(5120)], [[MIB, 3 * GIB - MIB], [HOLE_END, 2 * GIB]]),
        (
            ["-machine", "q35,memory-backend=ram,max-ram-below-4g=1G", *memory(5120)],
            [[MIB, GIB - MIB], [HOLE_END, 4 * GIB]],
        ),
        (
            ["-machine", "pc,memory-backend=ram,max-ram-below-4g=1G", *memory(5120)],
            [[MIB, GIB - MIB], [HOLE_END, 4 * GIB]],
        ),
        (
            ["-machine", "pc,memory-backend=ram", *memory(1024), *dimm("dimm0", 256), *dimm("dimm1", 128)],
            [[MIB, GIB - MIB], [HOLE_END, 256 * MIB], [HOLE_END + 256 * MIB, 128 * MIB]],
        ),
        (["-machine", "q35", *NODES], [[MIB, GIB // 2 - MIB], [GIB // 2, GIB // 2]]),
        (
            ["-machine", "pc", *NODES, *dimm("dimm0", 128)],
            [[MIB, GIB // 2 - MIB], [GIB // 2, GIB // 2], [HOLE_END, 128 * MIB]],
        ),
        (["-machine", "q35,memory-backend=ram", *memory(64), "-device", "VGA"], [[MIB, 63 * MIB]]),
        (["-machine", "q35,memory-backend=ram,smm=on", *memory(64)], [[MIB, 63 * MIB]]),
        (["-machine", "q35,memory-backend=ram", *memory(64), *VIRTIO_MEM], [[MIB, 63 * MIB], [HOLE_END, 128 * MIB]]),
        (SMALL, SMALL_RAM),
    ],
    ids=[
        *(
            "q35-1g",
            "q35-5g",
            "pc-5g",
            "q35-below-1g",
            "pc-below-1g",
            "pc-dimms",
            "nodes",
            "nodes-dimm",
            "video",
            "smm",
        ),
        *("virtio-mem", "small"),
    ],
)
async def test_an_address_of_the_guests_is_where_the_map_says(
    tmp_path: Path, arguments: list[str], expected: list[list[int]]
) -> None:
    async with stopped.stopped(tmp_path, *arguments) as machine:
        memory_map = await machine.memory()
        assert ends(memory_map) == expected
        for region in memory_map.regions:
            for within in (0, region.bytes // 2 & ~4095, region.bytes - 16):
                pattern = os.urandom(16)
                (piece,) = memory_map.locate([[region.address + within & ~4095, 4096]])
                os.pwrite(piece.fd, pattern, piece.offset + within % 4096)
                assert await stopped.read_physical(machine, region.address + within) == pattern


async def test_a_file_in_memory_is_as_good(tmp_path: Path) -> None:
    backing = TMPFS / f"ballast-test-{os.getpid()}"
    try:
        for kind, options in (("file", f"mem-path={backing},share=on"), ("ram", "share=on")):
            arguments = memory(64, options, kind)
            async with stopped.stopped(tmp_path, "-machine", "q35,memory-backend=ram", *arguments) as machine:
                (region,) = (await machine.memory()).regions
                os.pwrite(region.fd, b"sixteen bytes of", region.offset)
                assert await stopped.read_physical(machine, region.address) == b"sixteen bytes of"
    finally:
        backing.unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["-machine", "q35", "-m", "64M"], "the memory pc.ram is private"),
        (["-machine", "q35,memory-backend=ram", *memory(64, "share=off")], "the memory ram is private"),
        (["-machine", "q35,memory-backend=ram", *memory(64), "-overcommit", "mem-lock=on"], "mem-lock=on"),
        (["-machine", "q35,memory-backend=ram", *memory(64), "-incoming", "defer"], "in the state inmigrate"),
        (
            [
                *("-machine", "q35,memory-backend=ram", *memory(64), "-object", "cryptodev-vhost-user,id=cv,chardev=c"),
                *("-chardev", "socket,id=c,path=cv.sock,server=on,wait=off"),
            ],
            r"cv \(cryptodev-vhost-user\) is served by another process.* --safe-vhost-user cv",
        ),
    ],
    ids=["anonymous", "private", "locked", "incoming", "vhost-user"],
)
async def test_what_makes_punching_risky_is_refused_by_name(tmp_path: Path, arguments: list[str], problem: str) -> None:
    arguments = [one.replace("cv.sock", str(tmp_path / "cv.sock")) for one in arguments]
    async with stopped.stopped(tmp_path, *arguments) as machine:
        with pytest.raises(NotReclaimable, match=problem):
            await machine.memory()


async def test_a_vhost_user_device_that_is_listed_as_safe_is_no_reason(tmp_path: Path) -> None:
    chardev = f"socket,id=c,path={tmp_path / 'cv.sock'},server=on,wait=off"
    arguments = [*SMALL, "-chardev", chardev, "-object", "cryptodev-vhost-user,id=cv,chardev=c"]
    async with stopped.stopped(tmp_path, *arguments, safe=["cv"]) as machine:
        assert ends(await machine.memory()) == SMALL_RAM


async def test_memory_on_a_disk_is_refused(tmp_path: Path) -> None:
    if os.statvfs(tmp_path).f_fsid == os.statvfs(TMPFS).f_fsid:
        pytest.skip("the tests' folder is on a tmpfs")
    arguments = memory(64, f"mem-path={tmp_path / 'backing'},share=on", "file")
    async with stopped.stopped(tmp_path, "-machine", "q35,memory-backend=ram", *arguments) as machine:
        with pytest.raises(NotReclaimable, match="a file on no tmpfs"):
            await machine.memory()


@pytest.mark.parametrize("capability", ["background-snapshot", "postcopy-ram"])
async def test_a_migration_that_is_prepared_bars_punching(tmp_path: Path, capability: str) -> None:
    async with stopped.stopped(tmp_path, *SMALL) as machine:
        await machine.memory()
        switch = [{"capability": capability, "state": True}]
        try:
            await machine.qmp.run("migrate-set-capabilities", capabilities=switch)
        except QmpFailed as error:  # the kernel has no userfaultfd for it
            pytest.skip(error.desc)
        with pytest.raises(NotReclaimable, match=f"the migration capability {capability} is on"):
            await machine.memory()


async def test_a_socket_that_somebody_else_opened_is_refused(tmp_path: Path) -> None:
    with stopped.started(tmp_path, *SMALL) as path:
        async with connected(path):  # now it listens
            pass

        async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            theirs = await asyncio.open_unix_connection(path)
            async with asyncio.TaskGroup() as both:
                both.create_task(copy(reader, theirs[1]))
                both.create_task(copy(theirs[0], writer))

        front = tmp_path / "front.sock"
        async with await asyncio.start_unix_server(relay, front), connected(front) as machine:
            with pytest.raises(NotReclaimable, match=f"process {os.getpid()}, which opened .*, is not QEMU"):
                await machine.memory()


async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """All that comes, until it ends."""
    while data := await reader.read(1 << 16):
        writer.write(data)
    writer.close()


async def test_a_socket_in_use_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with stopped.started(tmp_path, *SMALL) as path:
        async with connected(path):
            monkeypatch.setattr(qmp, "CONNECT_TIMEOUT_S", 0.3)
            with pytest.raises(NoAnswer, match="is this QMP in use"):
                await Qemu.connect(str(path)).__aenter__()


async def test_a_reset_is_told_with_the_next_answer(tmp_path: Path) -> None:
    async with stopped.stopped(tmp_path, *SMALL) as machine:
        await machine.qmp.run("system_reset")
        await machine.qmp.run("cont")
        await machine.qmp.run("stop")
        assert set(await machine.upheavals()) == {"RESET", "STOP", "RESUME"}
        assert await machine.upheavals() == []


async def test_zeros_are_freed_and_nothing_else_is(tmp_path: Path) -> None:
    zero = range(8 * MIB, 24 * MIB)  # of the boot memory's file, below the hole
    async with stopped.stopped(tmp_path, *SMALL) as machine:
        memory_map = await machine.memory()
        for region in memory_map.regions:
            fill(region, zero=[zero] if region.address == MIB else [])
        before = contents(memory_map)
        everything = release(memory_map.locate(SMALL_RAM))
        assert everything == Released(191 * MIB, len(zero), 175 * MIB, len(zero))
        assert contents(memory_map) == before
        # Holes read as zero: punching them again is harmless and frees nothing; nor did the look fill them.
        assert release(memory_map.locate([[8 * MIB, 16 * MIB]])) == Released(16 * MIB, 16 * MIB, 0, 0)
        # One byte keeps its grain, and only that.
        low = memory_map.regions[0]
        os.pwrite(low.fd, bytes(16 * MIB), 8 * MIB)
        os.pwrite(low.fd, b"x", 13 * MIB)
        assert release(memory_map.locate([[8 * MIB, 16 * MIB]])) == Released(16 * MIB, 14 * MIB, 2 * MIB, 14 * MIB)
        assert os.pread(low.fd, 1, 13 * MIB) == b"x"


FORGED: list[list[list[int]]] = [
    [[0, 4096]],
    [[0x9F000, 4096]],
    [[MIB - 4096, 8192]],
    [[64 * MIB, 4096]],
    [[63 * MIB, 2 * MIB]],
    [[0xFEE00000, 4096]],
    [[HOLE_END - 4096, 8192]],
    [[HOLE_END + 128 * MIB, 4096]],
    [[HOLE_END + GIB + 64 * MIB, 4096]],
    [[HOLE_END + GIB + 63 * MIB, 2 * MIB]],
    [[MIB, HOLE_END]],
    [[MIB + 1, 4096]],
    [[MIB, 4095]],
    [[MIB, 0]],
    [[MIB, -4096]],
    [[-MIB, 4096]],
    [[2 * MIB, 4096], [2 * MIB, 4096]],
    [[2 * MIB, 8192], [2 * MIB + 4096, 4096]],
    [[3 * MIB, 4096], [2 * MIB, 4096]],
    [[MIB, 1 << 70]],
    [[1 << 70, 4096]],
    [[(1 << 64) - 4096, 8192]],
    [[2 * MIB]],
    [[2 * MIB, 4096, 4096]],
    [[2 * MIB, True]],
    [[]],
    [[2 * MIB, 4096], [0, 4096]],
]


def random_ranges(chance: random.Random) -> list[list[int]]:
    """One to four ranges, mostly plausible, around where the guest has memory."""
    ranges = []
    for _ in range(chance.randint(1, 4)):
        base, size_bytes = chance.choice([*SMALL_RAM, [0, HOLE_END + 2 * GIB]])
        grain_bytes = chance.choice([1, 4096, 4096, GRAIN_BYTES])
        address = base + chance.randrange(-MIB, size_bytes + MIB) // grain_bytes * grain_bytes
        sizes = [4096, 4096, 8192, GRAIN_BYTES, chance.randrange(-4096, MIB), chance.randrange(GIB)]
        ranges.append([address, chance.choice(sizes)])
    return sorted(ranges) if chance.random() < 0.8 else ranges


async def test_forged_ranges_are_refused_or_harmless(tmp_path: Path) -> None:
    chance = random.Random(os.urandom(8))
    async with stopped.stopped(tmp_path, *SMALL) as machine:
        memory_map = await machine.memory()
        for region in memory_map.regions:
            fill(region)
        before = contents(memory_map)
        for ranges in FORGED:
            with pytest.raises(WrongRanges):
                memory_map.locate(ranges)
        with pytest.raises(WrongRanges, match="of which it gave back a part before"):
            memory_map.locate([[8 * MIB, 4 * MIB]], [[4 * MIB, MIB], [11 * MIB, 2 * MIB]])
        accepted = sum(is_taken(memory_map, random_ranges(chance)) for _ in range(10_000))
        assert 0 < accepted < 10_000
        assert contents(memory_map) == before


async def test_without_the_zero_check_forged_ranges_lose_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test before this one can fail."""
    async with stopped.stopped(tmp_path, *SMALL) as machine:
        memory_map = await machine.memory()
        for region in memory_map.regions:
            fill(region)
        before = contents(memory_map)
        monkeypatch.setattr(linux, "is_zero", lambda *_: True)
        assert is_taken(memory_map, [[HOLE_END, GRAIN_BYTES]])
        assert contents(memory_map) != before


def is_taken(memory_map: MemoryMap, ranges: list[list[int]]) -> bool:
    """Try to punch; whether the ranges were taken for possible."""
    try:
        release(memory_map.locate(ranges))
    except WrongRanges:
        return False
    return True


def test_a_piece_beyond_the_end_of_its_file_is_not_zero(tmp_path: Path) -> None:
    with (tmp_path / "file").open("w+b") as file:
        file.truncate(GRAIN_BYTES)
        assert release([Piece(file.fileno(), 0, 2 * GRAIN_BYTES)]).not_zero_bytes == GRAIN_BYTES


def test_the_neighbours_of_a_range_can_be_in_another_file() -> None:
    memory_map = MemoryMap([Region(MIB, MIB, 10, MIB, "a"), Region(2 * MIB, MIB, 11, 0, "b")])
    assert memory_map.locate([[MIB + 4096, MIB]]) == [Piece(10, MIB + 4096, MIB - 4096), Piece(11, 0, 4096)]


async def test_a_dimm_that_is_plugged_in_is_on_the_map_at_once(tmp_path: Path) -> None:
    async with stopped.stopped(tmp_path, *SMALL) as machine:
        assert ends(await machine.memory()) == SMALL_RAM
        await machine.qmp.run("object-add", qom_type="memory-backend-memfd", id="late", share=True, size=32 * MIB)
        await machine.qmp.run("device_add", driver="pc-dimm", id="late0", memdev="late")
        assert ends(await machine.memory()) == [*SMALL_RAM, [HOLE_END + GIB + 64 * MIB, 32 * MIB]]
