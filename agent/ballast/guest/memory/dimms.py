"""Which memory blocks are which DIMM.

A DIMM is an ACPI memory device, PNP0C80 (drivers/acpi/acpi_memhotplug.c): the kernel binds each block of it to its
device, and sysfs shows that as ``memoryN/firmware_node``. What else was looked at in guests (QEMU 10, q35, Linux 6.1
and 6.12; boot memory up to 5 GiB and three DIMMs, all adjacent to each other):

- ``/proc/iomem``: neither DIMMs nor boot memory and a DIMM are merged, but nothing tells one from the other. It is
  there before the blocks' uevents, where ``firmware_node`` comes after them: so the zone of a new block goes by it.
- ``/sys/firmware/memmap``: shows DIMMs as well on 6.12, but not on 6.1.

Some firmware describes boot memory as such a device too (Hyper-V: "System RAM resource … cannot be added"), and the
kernel then binds its blocks as well. So what the guest booted with, by the e820 map, is never a DIMM.
"""

from __future__ import annotations

from dataclasses import dataclass

from ballast.guest.linux.boot_ram import BOOT_PARAMS, parse_boot_ram
from ballast.guest.linux.tree import Tree
from ballast.guest.memory.blocks import MEMORY, Blocks

_MEMORY_DEVICE = "PNP0C80"


@dataclass(frozen=True, slots=True)
class Dimm:
    """A DIMM: its first guest-physical address, and its blocks, rising."""

    address: int
    indexes: tuple[int, ...]


def read_dimms(tree: Tree, blocks: Blocks) -> list[Dimm]:
    """Every DIMM, by rising address; none where ACPI knows of none. NotSupported without memory hot-plug."""
    size_bytes = blocks.block_size_bytes()
    by_device: dict[str, list[int]] = {}
    for index in blocks.indexes():
        device = f"{MEMORY}/memory{index}/firmware_node"
        try:
            if tree.read(f"{device}/hid") == _MEMORY_DEVICE:
                by_device.setdefault(tree.read(f"{device}/path"), []).append(index)
        except OSError:  # boot memory, or unplugged this moment
            continue
    boot_ram = _read_boot_ram(tree)
    dimms = [Dimm(indexes[0] * size_bytes, tuple(indexes)) for indexes in by_device.values()]
    return sorted(
        (
            dimm
            for dimm in dimms
            if not any(_overlap(index * size_bytes, size_bytes, boot_ram) for index in dimm.indexes)
        ),
        key=lambda dimm: dimm.address,
    )


def _read_boot_ram(tree: Tree) -> list[tuple[int, int]]:
    try:
        return parse_boot_ram(tree.path(BOOT_PARAMS).read_bytes())
    except FileNotFoundError:  # not x86
        return []


def _overlap(address: int, size_bytes: int, ranges: list[tuple[int, int]]) -> bool:
    return any(address < first + range_bytes and first < address + size_bytes for first, range_bytes in ranges)
