"""Which physical memory is behind our own: Documentation/admin-guide/mm/pagemap.rst. CAP_SYS_ADMIN sees frames."""

from __future__ import annotations

import errno
import os
from array import array

PAGE_BYTES = os.sysconf("SC_PAGESIZE")
_ENTRY_BYTES = 8
_PRESENT = 1 << 63
_FRAME = (1 << 55) - 1


class Pagemap:
    """/proc/self/pagemap, opened once: nothing is to be opened where memory is short."""

    def __init__(self) -> None:
        self._fd = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)

    def ranges(self, address: int, bytes_: int) -> list[list[int]]:
        """Physical ranges, [[first byte, bytes]], of whole pages of ours, in the order of their addresses, merged.

        OSError: EFAULT if a page is not there, EPERM if the kernel does not tell where it is.
        """
        entries = array("Q")
        entries.frombytes(os.pread(self._fd, bytes_ // PAGE_BYTES * _ENTRY_BYTES, address // PAGE_BYTES * _ENTRY_BYTES))
        first = entries[0]
        # A huge page, as nearly all are: no need to look at each entry.
        if entries == array("Q", range(first, first + len(entries))):
            return [[_address_of(first), bytes_]]
        ranges: list[list[int]] = []
        for entry in entries:
            start = _address_of(entry)
            if ranges and ranges[-1][0] + ranges[-1][1] == start:
                ranges[-1][1] += PAGE_BYTES
            else:
                ranges.append([start, PAGE_BYTES])
        return ranges


def _address_of(entry: int) -> int:
    if not entry & _PRESENT:
        raise OSError(errno.EFAULT, "pagemap: the page is not there")
    if not entry & _FRAME:
        raise OSError(errno.EPERM, "pagemap: frames are hidden without CAP_SYS_ADMIN")
    return (entry & _FRAME) * PAGE_BYTES
