"""DIMMs in a folder: what is chosen, undone and told. Offlining itself is the kernel's, and tested in guests.

The child is real, and writes to the files of the folder; a file that nobody can write to is a block that fails.
"""

from __future__ import annotations

import asyncio
import errno
import os
from pathlib import Path
from typing import Any

import pytest

from ballast.guest.memory.blocks import MEMORY, Blocks
from ballast.guest.memory.decisions import Decisions
from ballast.guest.memory.leaving import Leaving
from ballast.guest.memory.offline import Offline
from ballast.guest.memory.offline_child import take_offline
from ballast.guest.memory.trim import RECLAIM
from ballast.wire.errors import BadRequest, Busy, NotSupported
from ballast.wire.memory_names import DimmResult, OfflineResult
from tests.unit.guest.conftest import MakeTree

SIZE_BYTES = 128 << 20
MEMINFO: tuple[str, ...] = ("MemFree", "Cached", "SReclaimable", "SwapCached", "Committed_AS")
MEMINFO += ("Active(anon)", "Inactive(anon)", "Active(file)", "Inactive(file)")

KINDS = ("some", "full")


def address(block: int) -> int:
    return block * SIZE_BYTES


class Guest:
    """Eight blocks of boot memory, and DIMMs as {first block: zone of each of its blocks, or offline}."""

    def __init__(
        self,
        make_tree: MakeTree,
        dimms: dict[int, list[str]],
        *,
        available_mib: int = 4096,
        swap_mib: int = 0,
        free_mib: int = 4096,
        stalls: float = 0.0,
    ) -> None:
        sizes = dict.fromkeys(MEMINFO, 0) | {"MemTotal": 8192, "MemAvailable": available_mib}
        sizes |= {"SwapTotal": swap_mib, "SwapFree": swap_mib, "MemFree": free_mib}
        meminfo = "".join(f"{name}: {mib << 10} kB\n" for name, mib in sizes.items())
        files = {
            f"{MEMORY}/block_size_bytes": "8000000\n",
            "proc/meminfo": meminfo,
            "proc/vmstat": "workingset_refault_anon 0\nworkingset_refault_file 0\n",
            "proc/pressure/memory": "".join(f"{kind} avg10={stalls} avg60=0 avg300=0 total=0\n" for kind in KINDS),
            "sys/fs/cgroup/cgroup.procs": "",
        }
        blocks: dict[int, tuple[str, int | None]] = dict.fromkeys(range(8), ("none", None))
        blocks |= {first + n: (zone, first) for first, zones in dimms.items() for n, zone in enumerate(zones)}
        for index, (zone, dimm) in blocks.items():
            files[f"{MEMORY}/memory{index}/state"] = "offline" if zone == "offline" else "online"
            files[f"{MEMORY}/memory{index}/valid_zones"] = zone
            if dimm is not None:
                files[f"{MEMORY}/memory{index}/firmware_node/hid"] = "PNP0C80"
                files[f"{MEMORY}/memory{index}/firmware_node/path"] = f"\\MP{dimm}"
        self.tree = make_tree(files)
        self.blocks = Blocks(self.tree)
        self.leaving = Leaving(self.tree.path("leaving.json"))
        self.decisions = Decisions()
        self.offline = Offline(self.tree, self.blocks, self.leaving, self.decisions)

    def states(self, first: int, count: int) -> list[str]:
        return [self.tree.read(f"{MEMORY}/memory{index}/state") for index in range(first, first + count)]

    def use(self, *, used_blocks: list[int]) -> None:
        """Have the kernel tell of each block's frames whether they are free, in a file with holes."""
        pages = SIZE_BYTES // 4096
        with self.tree.path("proc/kpageflags").open("wb") as file:
            for index in {*range(32, 48)} - {*used_blocks}:
                file.seek(8 * pages * index)
                file.write((1 << 10).to_bytes(8, "little") * pages)

    def refuse(self, index: int) -> None:
        """Make it a block that is online and cannot be written to, not even by root."""
        state = self.tree.path(f"{MEMORY}/memory{index}/state")
        state.unlink()
        state.symlink_to("/proc/version")


def told(result: OfflineResult) -> dict[int, tuple[str, str | None]]:
    return {one.phys_index: (one.result, one.reason) for one in result.blocks}


async def test_without_memory_hotplug_it_says_so(make_tree: MakeTree) -> None:
    tree = make_tree({})
    with pytest.raises(NotSupported):
        await Offline(tree, Blocks(tree), Leaving(tree.path("leaving.json"))).take(bytes_=1)


@pytest.mark.parametrize(
    ("wanted", "desc"),
    [
        ({"indexes": [0]}, "'blocks' names no block of a DIMM: \\[0\\]"),
        ({"indexes": [32, 99, 7]}, "'blocks' names no block of a DIMM: \\[7, 99\\]"),
        ({"indexes": [-1]}, "'blocks' names no block of a DIMM: \\[-1\\]"),
        ({"address": 0}, "'dimm' is the first address of no DIMM: 0x0"),
        ({"address": address(33)}, "'dimm' is the first address of no DIMM"),
        ({"address": address(32) + 1}, "'dimm' is the first address of no DIMM"),
    ],
)
async def test_boot_memory_and_what_is_no_dimm_is_refused_and_nothing_is_done(
    make_tree: MakeTree, wanted: dict[str, Any], desc: str
) -> None:
    guest = Guest(make_tree, {32: ["Movable"] * 2})
    with pytest.raises(BadRequest, match=desc):
        await guest.offline.take(**wanted)
    assert guest.states(0, 8) + guest.states(32, 2) == ["online"] * 10
    assert guest.leaving.indexes() == []


async def test_a_dimm_by_its_address_is_offline_whole_and_leaving(make_tree: MakeTree) -> None:
    guest = Guest(make_tree, {32: ["Movable"] * 2, 34: ["Movable", "Movable", "offline"]})
    result = await guest.offline.take(address=address(34))
    assert result.bytes == 2 * SIZE_BYTES
    assert told(result) == {34: ("done", None), 35: ("done", None), 36: ("already", None)}
    assert {one.zone for one in result.blocks[:2]} == {"movable"}
    assert result.dimms == [DimmResult(address(34), 3 * SIZE_BYTES, offline=True)]
    assert guest.states(32, 5) == ["online"] * 2 + ["offline"] * 3
    # What was offline before is somebody else's wish.
    assert guest.leaving.indexes() == [34, 35]


@pytest.mark.parametrize(
    ("blocks", "chosen"),
    [(0, []), (1, []), (2, [40]), (3, [40]), (4, [40, 34]), (5, [40, 34]), (7, [40, 34, 32]), (99, [40, 34, 32, 36])],
)
async def test_of_bytes_whole_dimms_movable_ones_first_and_never_more(
    make_tree: MakeTree, blocks: int, chosen: list[int]
) -> None:
    guest = Guest(make_tree, {32: ["Movable"] * 2, 34: ["Movable"] * 2, 36: ["Normal"] * 2, 40: ["offline"] * 2})
    result = await guest.offline.take(bytes_=blocks * SIZE_BYTES + (SIZE_BYTES - 1 if blocks < 99 else 0))
    assert [one.address for one in result.dimms] == [address(first) for first in chosen]
    assert all(one.offline for one in result.dimms)
    assert result.bytes == 2 * SIZE_BYTES * len(set(chosen) - {40})


async def test_of_two_the_one_with_less_in_use_is_taken(make_tree: MakeTree) -> None:
    guest = Guest(make_tree, {32: ["Movable"] * 2, 34: ["Movable"] * 2, 40: ["Movable"] * 2})
    guest.use(used_blocks=[33, 40, 41])
    for first in (34, 32, 40):
        result = await guest.offline.take(bytes_=2 * SIZE_BYTES)
        assert [one.address for one in result.dimms] == [address(first)]
        for index in (first, first + 1):
            guest.tree.path(f"{MEMORY}/memory{index}/firmware_node/hid").unlink()  # the host has taken it out


async def test_one_that_failed_lately_comes_last_unless_it_is_named(make_tree: MakeTree) -> None:
    guest = Guest(make_tree, {32: ["Normal"] * 2, 34: ["Movable"] * 2})
    guest.refuse(34)
    assert told(await guest.offline.take(bytes_=2 * SIZE_BYTES))[35] == ("failed", "undone")
    result = await guest.offline.take(bytes_=2 * SIZE_BYTES)
    assert [(one.address, one.offline) for one in result.dimms] == [(address(32), True)]
    named = await guest.offline.take(address=address(34))
    assert told(named)[34][0] == "failed"


@pytest.mark.parametrize(
    ("free_mib", "stalls", "trimmed"), [(512, 0.0, None), (140, 0.0, "20971520"), (140, 5.0, None)]
)
async def test_cold_page_cache_makes_room_for_what_has_to_move_but_never_under_pressure(
    make_tree: MakeTree, free_mib: int, stalls: float, trimmed: str | None
) -> None:
    """128 MiB are to be moved and 32 kept free; what is free in the other block goes with it."""
    guest = Guest(make_tree, {32: ["Movable"] * 2}, free_mib=free_mib + 128, stalls=stalls)
    guest.use(used_blocks=[33])
    assert (await guest.offline.take(address=address(32))).bytes == 2 * SIZE_BYTES
    reclaim = guest.tree.path(RECLAIM)
    last_bytes = {"20971520": "4194304 swappiness=0", None: None}[trimmed]  # the second piece, of 20 MiB
    assert (reclaim.read_text() if reclaim.exists() else None) == last_bytes


async def test_a_repeated_request_takes_no_more_and_starts_the_minute_anew(make_tree: MakeTree) -> None:
    guest = Guest(make_tree, {32: ["Movable"] * 2, 34: ["Movable"] * 2})
    first = await guest.offline.take(bytes_=2 * SIZE_BYTES)
    guest.leaving.forget([35])  # as if somebody else had taken that one
    again = await guest.offline.take(bytes_=2 * SIZE_BYTES)
    assert again.dimms == first.dimms
    assert (again.bytes, told(again)) == (0, {34: ("already", None), 35: ("already", None)})
    assert guest.leaving.indexes() == [34]
    assert guest.states(32, 2) == ["online"] * 2


async def test_blocks_of_several_dimms_are_taken_and_no_others(make_tree: MakeTree) -> None:
    guest = Guest(make_tree, {32: ["Movable"] * 2, 34: ["Movable"] * 2})
    result = await guest.offline.take(indexes=[35, 33, 32, 35])
    assert told(result) == dict.fromkeys((32, 33, 35), ("done", None))
    assert result.dimms == [
        DimmResult(address(32), 2 * SIZE_BYTES, offline=True),
        DimmResult(address(34), 2 * SIZE_BYTES, offline=False),
    ]
    assert guest.states(32, 4) == ["offline", "offline", "online", "offline"]


async def test_a_dimm_of_which_a_block_fails_is_online_again_in_its_zone_and_the_others_come_off(
    make_tree: MakeTree,
) -> None:
    guest = Guest(make_tree, {32: ["Movable"] * 2, 40: ["Normal", "Normal", "Movable", "Movable"]})
    guest.refuse(41)
    result = await guest.offline.take(bytes_=6 * SIZE_BYTES)
    reason = told(result)[41][1]
    assert reason in ("EIO", "EACCES")  # as root, and as anybody else
    assert {index: told(result)[index] for index in (40, 42, 43)} == {
        40: ("failed", "not-tried"),
        42: ("failed", "undone"),
        43: ("failed", "undone"),
    }
    assert guest.states(42, 2) == ["online_movable"] * 2
    assert guest.states(32, 2) == ["offline"] * 2
    assert {one.address: one.offline for one in result.dimms} == {address(32): True, address(40): False}
    assert (result.bytes, guest.leaving.indexes()) == (2 * SIZE_BYTES, [32, 33])


async def test_what_went_and_what_did_not_is_explained(make_tree: MakeTree) -> None:
    guest = Guest(make_tree, {32: ["movable"] * 2, 36: ["movable"] * 2})
    guest.refuse(33)
    await guest.offline.take(bytes_=4 * SIZE_BYTES)
    gone, stays = guest.decisions.last()
    assert (gone.change, gone.reason, gone.bytes) == ("offlined", "asked", 2 * SIZE_BYTES)
    assert (stays.change, stays.reason, stays.bytes) == ("offline-failed", "kernel", 2 * SIZE_BYTES)
    assert gone.numbers == stays.numbers
    assert (gone.numbers["available-bytes"], gone.numbers["swap-free-bytes"]) == (4 << 30, 0)


async def test_after_the_deadline_nothing_is_tried(make_tree: MakeTree) -> None:
    guest = Guest(make_tree, {32: ["Movable"] * 2})
    result = await guest.offline.take(address=address(32), timeout_s=1e-9)
    assert told(result) == {33: ("failed", "deadline"), 32: ("failed", "not-tried")}
    assert guest.states(32, 2) == ["online"] * 2


async def test_while_blocks_are_being_brought_online_it_waits_and_then_says_busy(make_tree: MakeTree) -> None:
    guest = Guest(make_tree, {32: ["Movable"] * 2})
    async with guest.blocks.changing:
        with pytest.raises(Busy):
            await guest.offline.take(address=address(32), timeout_s=0.01)
        waiting = asyncio.create_task(guest.offline.take(address=address(32)))
        await asyncio.sleep(0)
        assert guest.states(32, 2) == ["online"] * 2
    assert (await waiting).bytes == 2 * SIZE_BYTES


@pytest.mark.parametrize(("available_mib", "swap_mib", "fits"), [(983, 0, False), (984, 0, True), (900, 84, True)])
async def test_what_the_rest_has_no_room_for_is_not_tried(
    make_tree: MakeTree, available_mib: int, swap_mib: int, *, fits: bool
) -> None:
    """Of 8 GiB two blocks: 728 MiB, the floor of what is left, and 256 MiB must be available."""
    guest = Guest(make_tree, {32: ["Movable"] * 2}, available_mib=available_mib, swap_mib=swap_mib)
    result = await guest.offline.take(address=address(32))
    if fits:
        assert told(result) == {33: ("done", None), 32: ("done", None)}
    else:
        assert told(result) == {33: ("failed", "no-room"), 32: ("failed", "not-tried")}
        assert guest.states(32, 2) == ["online"] * 2


@pytest.mark.parametrize("cancelled", [False, True])
async def test_a_child_that_never_ends_is_killed(tmp_path: Path, *, cancelled: bool) -> None:
    """To open a FIFO for writing waits for a reader."""
    first, fifo = tmp_path / "first", tmp_path / "state"
    os.mkfifo(first)
    os.mkfifo(fifo)
    if not cancelled:
        assert await take_offline([fifo], 0.2) == errno.ETIMEDOUT
        return
    taking = asyncio.create_task(take_offline([first, fifo], 60))
    reader = await asyncio.to_thread(os.open, first, os.O_RDONLY)  # when the child writes to the first
    taking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await taking
    assert os.read(reader, 8) in (b"offline", b"")
    assert os.read(reader, 8) == b""  # nobody has it open any more
    os.close(reader)
