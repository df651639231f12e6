"""Cold page cache makes room before memory is taken away, so that nobody waits while the kernel moves the rest.

By cgroup2's ``memory.reclaim`` of the root (Documentation/admin-guide/cgroup-v2.rst, Linux 5.19), in small pieces,
until there is room, some task waits for memory, or what was driven out is read again.
"""

from __future__ import annotations

import errno
import logging
import time

from ballast.guest.linux.meminfo import parse_meminfo
from ballast.guest.linux.psi import parse_stalls
from ballast.guest.linux.tree import Tree
from ballast.guest.linux.vmstat import parse_vmstat

log = logging.getLogger(__name__)

RECLAIM = "sys/fs/cgroup/memory.reclaim"
PIECE_BYTES = 16 << 20
TRIM_S = 3.0
_CALM_PERCENT = 1.0
_PAGE_BYTES = 4096


def trim(tree: Tree, wanted_bytes: int, *, timeout_s: float = TRIM_S) -> int:
    """Have so much of the page cache driven out; how much was asked of the kernel with success.

    Nothing under pressure, or without ``memory.reclaim``. Blocks for ``timeout_s`` and a piece at most: for a thread.
    """
    deadline_s = time.monotonic() + timeout_s
    trimmed_bytes = 0
    try:
        if parse_stalls(tree.read("proc/pressure/memory")).some.avg10 >= _CALM_PERCENT:
            return 0
        refaults = _refaults(tree)
        while trimmed_bytes < wanted_bytes and time.monotonic() < deadline_s:
            _reclaim(tree, min(PIECE_BYTES, wanted_bytes - trimmed_bytes))
            trimmed_bytes += PIECE_BYTES
            if (_refaults(tree) - refaults) * _PAGE_BYTES > trimmed_bytes // 16:
                break
    except (OSError, ValueError) as error:  # EAGAIN: the kernel found no more
        log.debug("page cache is trimmed no further: %s", error)
    return min(trimmed_bytes, wanted_bytes)


def _reclaim(tree: Tree, bytes_: int) -> None:
    """Of files alone. Kernels before 6.9 cannot be told so, and do it where there is no swap to put programs into."""
    try:
        tree.write(RECLAIM, f"{bytes_} swappiness=0")
    except OSError as error:
        if error.errno != errno.EINVAL or parse_meminfo(tree.read("proc/meminfo")).swap_free_bytes:
            raise
        tree.write(RECLAIM, str(bytes_))


def _refaults(tree: Tree) -> int:
    return parse_vmstat(tree.read("proc/vmstat")).refault_file_pages
