"""Which frames of memory are free: /proc/kpageflags, Documentation/admin-guide/mm/pagemap.rst (Linux 6.1, 6.12).

fs/proc/page.c (stable_page_flags) sets BUDDY for every page of a free range, and then nothing else.
"""

from __future__ import annotations

import os
from array import array

from ballast.guest.linux.pagemap import PAGE_BYTES
from ballast.guest.linux.tree import Tree

KPAGEFLAGS = "proc/kpageflags"
_FREE = 1 << 10  # KPF_BUDDY, include/uapi/linux/kernel-page-flags.h
_STRETCH_PAGES, _STRETCHES = 512, 64


def count_free_bytes(tree: Tree, address: int, bytes_: int) -> int:
    """Free bytes of a range of memory; of more than 128 MiB by a sample of 64 stretches. OSError.

    256 KiB are read for a range, and the kernel looks at 32,768 frames.
    """
    pages = bytes_ // PAGE_BYTES
    step_pages = max(_STRETCH_PAGES, pages // _STRETCHES)
    looked_at = free = 0
    fd = os.open(tree.path(KPAGEFLAGS), os.O_RDONLY | os.O_CLOEXEC)
    try:
        for page in range(0, pages, step_pages):
            flags = array("Q")
            flags.frombytes(os.pread(fd, 8 * min(_STRETCH_PAGES, pages - page), 8 * (address // PAGE_BYTES + page)))
            looked_at += len(flags)
            free += flags.count(_FREE)
    finally:
        os.close(fd)
    return bytes_ * free // looked_at if looked_at else 0
