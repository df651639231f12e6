"""Commands about memory, on kernels recorded from real guests."""

from __future__ import annotations

import errno
from typing import Any

import pytest

from ballast.guest.commands.memory import MemoryCommands
from ballast.guest.dispatch import Table
from ballast.guest.events import Events
from ballast.guest.linux.tree import Tree
from ballast.guest.memory.balloon import Balloon
from ballast.guest.memory.blocks import MEMORY, Blocks
from ballast.guest.memory.decisions import Decisions
from ballast.guest.memory.leaving import Leaving
from ballast.guest.memory.level import PressureLevel
from ballast.guest.memory.offline import Offline
from ballast.guest.memory.status import MemoryFacts
from ballast.wire.message import Failure, Reply
from tests.unit.guest.conftest import MakeTree
from tests.unit.guest.test_dispatch import Friend


def make_table(tree: Tree) -> Table:
    table = Table(is_frozen=lambda: False)
    blocks, balloon = Blocks(tree), Balloon(tree, Events(), boot_id="b")
    facts = MemoryFacts(tree, PressureLevel(tree), blocks, balloon, boot_id="b")
    offline = Offline(tree, blocks, Leaving(tree.path("leaving.json")))
    table.add(MemoryCommands(facts, blocks, offline, balloon, Decisions()))
    return table


async def ask(tree: Tree, execute: str, **arguments: Any) -> Any:
    """What is returned, or the error's reason and text."""
    answer = await make_table(tree).answer({"execute": execute, "arguments": arguments}, Friend())
    if isinstance(answer, Failure):
        return answer.error.reason, answer.error.desc
    assert isinstance(answer, Reply)
    return answer.value


@pytest.mark.parametrize(
    ("arguments", "desc"),
    [
        ({"bytes": 1, "blocks": [1]}, "Parameter 'bytes' and parameter 'blocks' exclude each other"),
        ({"bytes": -1}, "Parameter 'bytes' expects 0 or more"),
        ({"zone": "normal"}, "Parameter 'zone' does not accept value 'normal'"),
        ({"blocks": [36]}, "Parameter 'blocks' names no memory block: [36]"),
    ],
)
async def test_wrong_arguments_online_nothing(recorded: Tree, arguments: dict[str, Any], desc: str) -> None:
    assert await ask(recorded, "ballast-memory-online", **arguments) == ("bad-argument", desc)
    assert recorded.read(f"{MEMORY}/memory34/state") == "offline"


async def test_online_tells_of_each_block(recorded: Tree) -> None:
    said = await ask(recorded, "ballast-memory-online", blocks=[34, 32])
    assert said["bytes"] == 128 << 20
    done, already = said["blocks"]
    assert (done.pop("online-us") >= 0, done) == (True, {"phys-index": 34, "zone": "movable", "result": "done"})
    assert already == {"phys-index": 32, "zone": "movable", "result": "already"}


@pytest.mark.parametrize(
    ("arguments", "desc"),
    [
        ({}, "Exactly one of 'bytes', 'blocks' and 'dimm' is expected"),
        ({"bytes": 1, "dimm": 0}, "Exactly one of 'bytes', 'blocks' and 'dimm' is expected"),
        ({"bytes": 1, "blocks": []}, "Exactly one of 'bytes', 'blocks' and 'dimm' is expected"),
        ({"bytes": -1}, "Parameter 'bytes' expects 0 or more"),
        ({"bytes": 1, "timeout-ms": 0}, "Parameter 'timeout-ms' expects 1 to 600000"),
        ({"bytes": 1, "timeout-ms": 600_001}, "Parameter 'timeout-ms' expects 1 to 600000"),
        ({"blocks": [0]}, "Parameter 'blocks' names no block of a DIMM: [0]"),
        ({"dimm": 1}, "Parameter 'dimm' is the first address of no DIMM: 0x1"),
    ],
)
async def test_wrong_arguments_offline_nothing(recorded: Tree, arguments: dict[str, Any], desc: str) -> None:
    assert await ask(recorded, "ballast-memory-offline", **arguments) == ("bad-argument", desc)
    assert recorded.read(f"{MEMORY}/memory33/state") == "online"


async def test_offline_tells_of_each_block_and_dimm(recorded: Tree) -> None:
    said = await ask(recorded, "ballast-memory-offline", dimm=1 << 32)
    assert said == {
        "bytes": 256 << 20,
        "blocks": [{"phys-index": index, "zone": "movable", "result": "done"} for index in (32, 33)],
        "dimms": [{"address": 1 << 32, "bytes": 256 << 20, "offline": True}],
    }


async def test_what_is_leaving_comes_online_by_name_or_with_all_but_not_by_bytes(recorded: Tree) -> None:
    await ask(recorded, "ballast-memory-offline", dimm=1 << 32)
    said = await ask(recorded, "ballast-memory-online", bytes=1 << 30)
    assert [one["phys-index"] for one in said["blocks"]] == [34, 35]
    said = await ask(recorded, "ballast-memory-online", blocks=[33])
    assert [one["phys-index"] for one in said["blocks"]] == [33]
    said = await ask(recorded, "ballast-memory-online")
    assert [one["phys-index"] for one in said["blocks"]] == [32]


async def test_status_is_on_the_wire_what_the_protocol_says(recorded: Tree) -> None:
    status = await ask(recorded, "ballast-memory-status")
    assert status["boot-id"] == "b"
    assert status["kernel-balloon"] is None
    assert status["blocks"] == {"size-bytes": 128 << 20, "online": 10, "offline": 2, "movable-online": 2}
    assert set(status["psi"]["some"]) == {"avg10", "avg60", "avg300", "total-us"}


async def test_blocks_as_qga_tells_them(recorded: Tree) -> None:
    blocks = await ask(recorded, "guest-get-memory-blocks")
    assert len(blocks) == 12
    assert blocks[-1] == {"phys-index": 35, "online": False, "can-offline": True}
    assert await ask(recorded, "guest-get-memory-block-info") == {"size": 128 << 20}


async def test_blocks_are_set_as_qga_does_it(recorded: Tree) -> None:
    wanted = [(34, True), (32, True), (99, False), (33, False)]
    said = await ask(
        recorded, "guest-set-memory-blocks", **{"mem-blks": [{"phys-index": n, "online": on} for n, on in wanted]}
    )
    assert said == [
        {"phys-index": 34, "response": "success"},
        {"phys-index": 32, "response": "success"},
        {"phys-index": 99, "response": "not-found", "error-code": errno.ENOENT},
        {"phys-index": 33, "response": "success"},
    ]
    assert recorded.read(f"{MEMORY}/memory34/state") == "online_movable"


async def test_without_memory_hotplug_it_says_so(make_tree: MakeTree) -> None:
    for name in ("ballast-memory-online", "guest-get-memory-blocks", "guest-get-memory-block-info"):
        assert (await ask(make_tree({}), name))[0] == "not-supported"
