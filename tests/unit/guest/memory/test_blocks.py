"""Memory blocks in a folder: what would be written where. Onlining itself is the kernel's, and tested in guests."""

from __future__ import annotations

import errno
from collections.abc import Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ballast.guest.linux.tree import Tree
from ballast.guest.memory.blocks import MEMORY, Block, Blocks
from ballast.guest.memory.floor import MOVABLE_RATIO
from ballast.wire.errors import BadRequest, NotSupported
from ballast.wire.memory_names import BlockCounts
from tests.unit.guest.conftest import MakeTree

SIZE_BYTES = 128 << 20
# How recorded guests are: boot memory is 0 to 7, then come two DIMMs of two blocks.
ONLINE_DIMM, OFFLINE_DIMM = [32, 33], [34, 35]


def states(tree: Tree, indexes: list[int]) -> list[str]:
    """What was written, or stood, in those blocks' files."""
    return [tree.read(f"{MEMORY}/memory{index}/state") for index in indexes]


def kernel(*, boot_blocks: int, dimms: Mapping[int, list[str]], movable_blocks: int = 0) -> dict[str, str]:
    """A kernel with so many online boot blocks, and DIMMs as {first block: [state of each block]}."""
    files = {f"{MEMORY}/block_size_bytes": "8000000\n"}
    iomem = f"00100000-{boot_blocks * SIZE_BYTES - 1:08x} : System RAM\n"
    for index in range(boot_blocks):
        files[f"{MEMORY}/memory{index}/state"] = "online\n"
        files[f"{MEMORY}/memory{index}/valid_zones"] = "none\n"
    for first, blocks in dimms.items():
        iomem += f"{first * SIZE_BYTES:x}-{(first + len(blocks)) * SIZE_BYTES - 1:x} : System RAM\n"
        for index, state in enumerate(blocks, first):
            files[f"{MEMORY}/memory{index}/state"] = "offline\n" if state == "offline" else "online\n"
            files[f"{MEMORY}/memory{index}/valid_zones"] = f"{state}\n"
    pages = SIZE_BYTES // 4096
    zones = f"Node 0, zone Normal\n  present {boot_blocks * pages}\n"
    zones += f"Node 0, zone Movable\n  present {movable_blocks * pages}\n"
    return {**files, "proc/iomem": iomem, "proc/zoneinfo": zones}


async def test_without_memory_hotplug_nothing_is_there(make_tree: MakeTree) -> None:
    blocks = Blocks(make_tree({}))
    with pytest.raises(NotSupported):
        blocks.block_size_bytes()
    with pytest.raises(NotSupported):
        blocks.read_all()
    with pytest.raises(NotSupported):
        await blocks.online()
    assert blocks.counts() == BlockCounts(0, 0, 0, 0)
    assert blocks.offline_indexes() == []
    assert await blocks.set_state(5, online=True) == ("not-found", errno.ENOENT)


def test_recorded_blocks_are_counted(recorded: Tree) -> None:
    blocks = Blocks(recorded)
    assert blocks.counts() == BlockCounts(SIZE_BYTES, online=10, offline=2, movable_online=2)
    assert blocks.offline_indexes() == OFFLINE_DIMM
    everything = blocks.read_all()
    assert [block.phys_index for block in everything] == [*range(8), *ONLINE_DIMM, *OFFLINE_DIMM]
    assert everything[-1] == Block(35, is_online=False, is_removable=True)


def test_what_else_is_in_the_folder_is_no_block(make_tree: MakeTree) -> None:
    names = ("power/x", "memory/x", "memoryx/state", "memory-1/state", "auto_online_blocks")
    tree = make_tree({f"{MEMORY}/{name}": "offline" for name in names} | {f"{MEMORY}/block_size_bytes": "8000000"})
    assert Blocks(tree).read_all() == []
    assert Blocks(tree).offline_indexes() == []


async def test_recorded_dimm_is_onlined_whole_in_one_zone(recorded: Tree) -> None:
    result = await Blocks(recorded).online()
    assert result.bytes == 2 * SIZE_BYTES
    assert [(one.phys_index, one.zone, one.result) for one in result.blocks] == [
        (34, "movable", "done"),
        (35, "movable", "done"),
    ]
    assert all(one.online_us is not None for one in result.blocks)
    assert states(recorded, OFFLINE_DIMM) == ["online_movable"] * 2
    assert states(recorded, ONLINE_DIMM) == ["online"] * 2


@pytest.mark.parametrize(
    ("bytes_", "onlined"), [(0, 0), (SIZE_BYTES - 1, 0), (SIZE_BYTES, 1), (2 * SIZE_BYTES - 1, 1), (1 << 40, 2)]
)
async def test_never_more_bytes_than_asked_for(recorded: Tree, bytes_: int, onlined: int) -> None:
    result = await Blocks(recorded).online(bytes_=bytes_)
    assert result.bytes == onlined * SIZE_BYTES
    assert [one.phys_index for one in result.blocks] == OFFLINE_DIMM[:onlined]
    assert states(recorded, OFFLINE_DIMM[onlined:]) == ["offline"] * (2 - onlined)


async def test_named_blocks_and_no_others(recorded: Tree) -> None:
    result = await Blocks(recorded).online(indexes=[35, 32, 0], zone="kernel")
    assert [(one.phys_index, one.zone, one.result) for one in result.blocks] == [
        (35, "kernel", "done"),
        (32, "movable", "already"),
        (0, "kernel", "already"),
    ]
    assert result.bytes == SIZE_BYTES
    assert states(recorded, [34, 35]) == ["offline", "online_kernel"]


@pytest.mark.parametrize("index", [8, 36, -1, 1 << 62])
async def test_an_unknown_block_is_a_bad_argument_and_nothing_is_done(recorded: Tree, index: int) -> None:
    with pytest.raises(BadRequest, match=f"'blocks' names no memory block: \\[{index}\\]"):
        await Blocks(recorded).online(indexes=[34, index])
    assert states(recorded, OFFLINE_DIMM) == ["offline"] * 2


def refuse_writes(tree: Tree, index: int) -> None:
    """Give a block a state that nobody can write, not even root."""
    state = tree.path(f"{MEMORY}/memory{index}/state")
    state.unlink()
    state.symlink_to("/proc/version")


async def test_a_block_that_fails_does_not_stop_the_others(recorded: Tree) -> None:
    refuse_writes(recorded, 34)
    failed, done = (await Blocks(recorded).online(indexes=[34, 35])).blocks
    assert (failed.phys_index, failed.zone, failed.result) == (34, "movable", "failed")
    assert failed.reason in ("EIO", "EACCES")  # as root, and as anybody else
    assert (done.phys_index, done.result) == (35, "done")
    assert states(recorded, [35]) == ["online_movable"]


@pytest.mark.parametrize(
    ("boot_blocks", "movable_blocks", "dimm_blocks", "zone"),
    [
        (8, 0, 24, "movable"),
        (8, 0, 25, "kernel"),
        (8, 16, 8, "movable"),
        (8, 17, 8, "kernel"),
        (1, 0, 4, "kernel"),
    ],
)
async def test_zone_rule(
    make_tree: MakeTree, boot_blocks: int, movable_blocks: int, dimm_blocks: int, zone: str
) -> None:
    """Movable while (movable + DIMM) is at most three times the rest."""
    dimms = {32: ["offline"] * dimm_blocks}
    tree = make_tree(kernel(boot_blocks=boot_blocks, dimms=dimms, movable_blocks=movable_blocks))
    result = await Blocks(tree).online(indexes=[32])
    assert result.blocks[0].zone == zone
    assert states(tree, [32]) == [f"online_{zone}"]


@pytest.mark.parametrize(("balloon_blocks", "zone"), [(0, "movable"), (2, "movable"), (3, "kernel"), (8, "kernel")])
async def test_what_the_balloon_holds_is_not_the_kernel_s(make_tree: MakeTree, balloon_blocks: int, zone: str) -> None:
    tree = make_tree(kernel(boot_blocks=8, dimms={32: ["offline"] * 18}))
    result = await Blocks(tree, lambda: balloon_blocks * SIZE_BYTES).online(indexes=[32])
    assert result.blocks[0].zone == zone


@settings(max_examples=30)
@given(
    boot_blocks=st.integers(1, 16), movable_blocks=st.integers(0, 64), dimms=st.lists(st.integers(1, 16), max_size=4)
)
async def test_the_rule_holds_for_each_dimm_and_no_dimm_is_split(
    tmp_path_factory: pytest.TempPathFactory, boot_blocks: int, movable_blocks: int, dimms: list[int]
) -> None:
    first, layout = 100, {}
    for blocks in dimms:
        layout[first] = ["offline"] * blocks
        first += blocks
    root = tmp_path_factory.mktemp("kernel")
    for name, text in kernel(boot_blocks=boot_blocks, dimms=layout, movable_blocks=movable_blocks).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    result = await Blocks(Tree(root)).online()
    zones = {one.phys_index: one.zone for one in result.blocks}
    for start, blocks_of in layout.items():
        fits = movable_blocks + len(blocks_of) <= MOVABLE_RATIO * boot_blocks
        assert {zones[start + i] for i in range(len(blocks_of))} == {"movable" if fits else "kernel"}


@pytest.mark.parametrize(("of_the_dimm", "zone"), [("Movable", "movable"), ("Normal", "kernel"), ("none", "kernel")])
async def test_the_rest_of_a_dimm_follows_what_is_online_of_it(
    make_tree: MakeTree, of_the_dimm: str, zone: str
) -> None:
    """Whatever the rule would say of it now."""
    tree = make_tree(kernel(boot_blocks=8, dimms={32: [of_the_dimm, "offline", "offline"]}))
    result = await Blocks(tree).online()
    assert [one.zone for one in result.blocks] == [zone] * 2


async def test_without_ranges_of_ram_a_block_is_a_dimm_of_its_own(make_tree: MakeTree) -> None:
    files = kernel(boot_blocks=1, dimms={32: ["offline"] * 4})
    tree = make_tree(files | {"proc/iomem": "00000000-00000000 : System RAM\n"})
    assert [one.zone for one in (await Blocks(tree).online()).blocks] == ["movable"] * 4


@pytest.mark.parametrize(
    ("index", "online", "result", "written"),
    [
        (99, True, ("not-found", errno.ENOENT), None),
        (99, False, ("not-found", errno.ENOENT), None),
        (34, False, ("success", None), "offline"),
        (33, True, ("success", None), "online"),
        (34, True, ("success", None), "online"),
        (33, False, ("success", None), "offline"),
    ],
)
async def test_set_state_as_qga_answers(
    recorded: Tree, index: int, result: tuple[str, int | None], written: str | None, *, online: bool
) -> None:
    assert await Blocks(recorded).set_state(index, online=online) == result
    if written:
        assert states(recorded, [index])[0].startswith(written)


async def test_set_state_gives_the_kernel_s_errno(recorded: Tree) -> None:
    refuse_writes(recorded, 34)
    result, number = await Blocks(recorded).set_state(34, online=True)
    assert result == "operation-failed"
    assert number in (errno.EIO, errno.EACCES)


async def test_virtio_mem_s_blocks_are_onlined_but_never_taken_offline(make_tree: MakeTree) -> None:
    files = kernel(boot_blocks=8, dimms={32: ["Movable"]})
    address = 40 * SIZE_BYTES
    files["proc/iomem"] += f"{address:x}-{address + 8 * SIZE_BYTES - 1:x} : virtio0\n"
    files["proc/iomem"] += f"  {address:x}-{address + SIZE_BYTES - 1:x} : System RAM (virtio_mem)\n"
    files[f"{MEMORY}/memory40/state"] = "offline\n"
    tree = make_tree(files)
    blocks = Blocks(tree)
    assert await blocks.set_state(40, online=True) == ("success", None)
    tree.write(f"{MEMORY}/memory40/state", "online")
    assert await blocks.set_state(40, online=False) == ("operation-not-supported", None)
    assert states(tree, [40]) == ["online"]


async def test_what_is_handed_out_is_onlined_until_there_is_no_more(recorded: Tree) -> None:
    queue = [34, 99, 35, None]
    results = await Blocks(recorded).online_next(lambda: queue.pop(0))
    assert [(one.phys_index, one.zone, one.result) for one in results] == [
        (34, "movable", "done"),
        (35, "movable", "done"),
    ]
    assert states(recorded, OFFLINE_DIMM) == ["online_movable"] * 2
