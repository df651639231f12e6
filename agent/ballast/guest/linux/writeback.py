"""What the page cache has not written yet, and how much that may be: proc_meminfo(5), ``fs/proc/meminfo.c``,
Documentation/admin-guide/sysctl/vm.rst.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
from pathlib import Path

from ballast.guest.linux import settings
from ballast.guest.linux.tree import Tree

LEAST_BYTES = 4 << 20  # so much is soon written; with less, writers wait for each other
MARK = settings.MARKS / "dirty-limits"

_LOOSE_BYTES = 32 << 20
# The lower end of what the kernel aims at is half the limit: at the limit itself writers stand still.
_ROOM = 1.5
_SYSCTL = "proc/sys/vm"
# "Dirty:              6412 kB"
_DIRTY = re.compile(r"^(?:Dirty|Writeback): +(\d+) kB$", re.MULTILINE)
_THRESHOLD = re.compile(r"^nr_dirty_threshold (\d+)$", re.MULTILINE)


def read_dirty_bytes(tree: Tree) -> int:
    """Bytes that wait to be written, or are being written, of all file systems together. OSError."""
    return sum(1024 * int(kib) for kib in _DIRTY.findall(tree.read("proc/meminfo")))


class DirtyLimit:
    """How much may be dirty in the whole system, lowered for some seconds. Nothing is changed without a mark.

    Lowered at one blow below what is dirty, it would have whoever writes most stand still until that is written.
    """

    def __init__(self, tree: Tree, mark: Path = MARK) -> None:
        self._tree = tree
        self._mark = mark
        self._bytes: float = math.inf

    def follow(self) -> None:
        """Lower it to a little more than what is dirty, so that this becomes less; to be called again and again."""
        with contextlib.suppress(OSError):
            self._lower(max(LEAST_BYTES, round(_ROOM * read_dirty_bytes(self._tree))))

    def loosen(self) -> None:
        """Let whoever waits at the limit go on, but not write for ever. Nothing if it is not lowered."""
        if self._bytes < _LOOSE_BYTES:
            with contextlib.suppress(OSError):
                self._write(_LOOSE_BYTES)

    def restore(self) -> None:
        """As it was before; also what an earlier process has left lowered."""
        self._bytes = math.inf
        with contextlib.suppress(OSError):
            settings.restore(self._mark)

    def _lower(self, limit_bytes: int) -> None:
        if math.isinf(self._bytes):
            if limit_bytes >= self._threshold_bytes():
                return
            settings.change(self._mark, {}, self._now("dirty") | self._now("dirty_background"))
        if limit_bytes < self._bytes:
            self._write(limit_bytes)

    def _write(self, limit_bytes: int) -> None:
        # The limit first: as long as it is the lower one, the kernel takes half of it for the background's.
        self._tree.write(f"{_SYSCTL}/dirty_bytes", str(limit_bytes))
        self._tree.write(f"{_SYSCTL}/dirty_background_bytes", str(limit_bytes // 8))
        self._bytes = limit_bytes

    def _threshold_bytes(self) -> int:
        """What the limit is now, whatever it is set in."""
        found = _THRESHOLD.search(self._tree.read("proc/vmstat"))
        return int(found.group(1)) * os.sysconf("SC_PAGE_SIZE") if found else 0

    def _now(self, name: str) -> dict[Path, str]:
        """A limit as it is set: in bytes or as a ratio, of which one is 0, and to write the one makes the other 0."""
        kind = "bytes" if int(self._tree.read(f"{_SYSCTL}/{name}_bytes")) > 0 else "ratio"
        path = f"{_SYSCTL}/{name}_{kind}"
        return {self._tree.path(path): self._tree.read(path)}
