"""What the page cache has not written yet: proc_meminfo(5), ``fs/proc/meminfo.c``."""

from __future__ import annotations

import re

from ballast.guest.linux.tree import Tree

# "Dirty:              6412 kB"
_DIRTY = re.compile(r"^(?:Dirty|Writeback): +(\d+) kB$", re.MULTILINE)


def read_dirty_bytes(tree: Tree) -> int:
    """Bytes that wait to be written, or are being written, of all file systems together. OSError."""
    return sum(1024 * int(kib) for kib in _DIRTY.findall(tree.read("proc/meminfo")))
