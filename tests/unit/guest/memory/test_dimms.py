"""Which blocks are which DIMM, and which are boot memory whatever ACPI says."""

from __future__ import annotations

import struct

import pytest

from ballast.guest.linux.boot_ram import BOOT_PARAMS
from ballast.guest.linux.tree import Tree
from ballast.guest.memory.blocks import MEMORY, Blocks
from ballast.guest.memory.dimms import Dimm, read_dimms
from ballast.wire.errors import NotSupported
from tests.unit.guest.conftest import MakeTree

SIZE_BYTES = 128 << 20


def devices(layout: dict[int, str], *, hid: str = "PNP0C80") -> dict[str, str]:
    """Blocks {index: path of its ACPI device}."""
    files = {f"{MEMORY}/block_size_bytes": "8000000\n"}
    for index, path in layout.items():
        files[f"{MEMORY}/memory{index}/state"] = "online\n"
        files[f"{MEMORY}/memory{index}/firmware_node/hid"] = f"{hid}\n"
        files[f"{MEMORY}/memory{index}/firmware_node/path"] = f"{path}\n"
    return files


def test_recorded_guests_have_two_dimms_of_two_blocks(recorded: Tree) -> None:
    """They are adjacent, and no block of boot memory is any's."""
    assert read_dimms(recorded, Blocks(recorded)) == [Dimm(1 << 32, (32, 33)), Dimm((1 << 32) + (256 << 20), (34, 35))]


def test_without_memory_hotplug_it_says_so(make_tree: MakeTree) -> None:
    tree = make_tree({})
    with pytest.raises(NotSupported):
        read_dimms(tree, Blocks(tree))


def test_blocks_of_one_device_are_one_dimm_by_rising_address(make_tree: MakeTree) -> None:
    layout = {9: "\\MP01", 10: "\\MP01", 100: "\\MP01", 12: "\\MP00", 8: "\\MP0A"}
    tree = make_tree(devices(layout) | {f"{MEMORY}/memory0/state": "online\n"})
    assert [dimm.indexes for dimm in read_dimms(tree, Blocks(tree))] == [(8,), (9, 10, 100), (12,)]


def test_other_devices_are_no_dimms(make_tree: MakeTree) -> None:
    tree = make_tree(devices({9: "\\X"}, hid="ACPI0012"))
    assert read_dimms(tree, Blocks(tree)) == []


def test_boot_memory_that_acpi_calls_a_device_is_no_dimm(make_tree: MakeTree) -> None:
    """Not even where only its last bytes are in a block of the device's."""
    tree = make_tree(devices({0: "\\BOOT", 1: "\\BOOT", 2: "\\MP00", 3: "\\MP00", 4: "\\MP01"}))
    data = bytearray(4096)
    data[0x1E8] = 2
    struct.pack_into("<QQI", data, 0x2D0, 1 << 20, SIZE_BYTES, 1)
    struct.pack_into("<QQI", data, 0x2D0 + 20, 3 * SIZE_BYTES, 1, 1)
    path = tree.path(BOOT_PARAMS)
    path.parent.mkdir(parents=True)
    path.write_bytes(data)
    assert [dimm.indexes for dimm in read_dimms(tree, Blocks(tree))] == [(4,)]
