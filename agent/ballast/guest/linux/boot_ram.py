"""The memory that the guest booted with: the e820 map in x86's boot parameters, as the firmware gave it.

arch/x86/include/uapi/asm/bootparam.h (``struct boot_params``), shown since Linux 3.14 by
Documentation/ABI/testing/sysfs-kernel-boot_params. Other architectures have no such file.
"""

from __future__ import annotations

import struct

BOOT_PARAMS = "sys/kernel/boot_params/data"

_COUNT_OFFSET, _TABLE_OFFSET = 0x1E8, 0x2D0  # e820_entries, e820_table
_TABLE_ENTRIES = 128  # E820_MAX_ENTRIES_ZEROPAGE
_ENTRY = struct.Struct("<QQI")  # struct boot_e820_entry: addr, size, type
_RAM = 1  # E820_TYPE_RAM


def parse_boot_ram(data: bytes) -> list[tuple[int, int]]:
    """Ranges of RAM as [(first byte, bytes)]; ValueError for what is no ``struct boot_params``."""
    table = data[_TABLE_OFFSET : _TABLE_OFFSET + _TABLE_ENTRIES * _ENTRY.size]
    if len(table) != _TABLE_ENTRIES * _ENTRY.size or data[_COUNT_OFFSET] > _TABLE_ENTRIES:
        raise ValueError("boot parameters without an e820 table")
    entries = list(_ENTRY.iter_unpack(table))[: data[_COUNT_OFFSET]]
    return [(first, size_bytes) for first, size_bytes, kind in entries if kind == _RAM]
