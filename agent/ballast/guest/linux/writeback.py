"""What the page cache has not written yet, and how much that may be: proc_meminfo(5), ``fs/proc/meminfo.c``,
Documentation/admin-guide/sysctl/vm.rst.
"""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

from ballast.guest.linux import settings
from ballast.guest.linux.tree import Tree

LIMIT_BYTES = 16 << 20
MARK = settings.MARKS / "dirty-limits"

_SYSCTL = "proc/sys/vm"
# "Dirty:              6412 kB"
_DIRTY = re.compile(r"^(?:Dirty|Writeback): +(\d+) kB$", re.MULTILINE)


def read_dirty_bytes(tree: Tree) -> int:
    """Bytes that wait to be written, or are being written, of all file systems together. OSError."""
    return sum(1024 * int(kib) for kib in _DIRTY.findall(tree.read("proc/meminfo")))


def limit_dirty(tree: Tree, mark: Path = MARK) -> None:
    """Let no more than ``LIMIT_BYTES`` be dirty until ``restore``: who writes faster than the disks is slowed down.

    Nothing where the limits are as low already, or cannot be written.
    """
    with contextlib.suppress(OSError):
        before = _limit(tree, "dirty") | _limit(tree, "dirty_background")
        if not 0 < int(tree.read(f"{_SYSCTL}/dirty_bytes")) <= LIMIT_BYTES:
            # The limit first: as long as it is the lower one, the kernel takes half of it for the background's.
            values = {"dirty_bytes": LIMIT_BYTES, "dirty_background_bytes": LIMIT_BYTES // 8}
            lower = {tree.path(f"{_SYSCTL}/{name}"): str(value) for name, value in values.items()}
            settings.change(mark, lower, before)


def restore(mark: Path = MARK) -> None:
    """As it was before; may be called by anybody, any number of times."""
    with contextlib.suppress(OSError):
        settings.restore(mark)


def _limit(tree: Tree, name: str) -> dict[Path, str]:
    """A limit as it is: in bytes or as a ratio, of which one is 0, and to write the one makes the other 0."""
    kind = "bytes" if int(tree.read(f"{_SYSCTL}/{name}_bytes")) > 0 else "ratio"
    path = f"{_SYSCTL}/{name}_{kind}"
    return {tree.path(path): tree.read(path)}
