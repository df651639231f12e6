"""One chunk of the balloon, in the holder: huge pages that are pinned, not to be touched, and known by their frames.

The order matters. Pinning (FOLL_LONGTERM) may move a page, so frames are looked up after it; and the pages are never
written after the kernel has zeroed them, since the host gives away only what it reads as zero. Stdlib and kernel only,
as all of the holder.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from ballast.guest.linux import mman
from ballast.guest.linux.pagemap import Pagemap
from ballast.guest.linux.uring import Ring
from ballast.guest.memory.holder_protocol import GRAIN_BYTES, RANGES_MAX


class Chunk:
    """Up to 64 MiB. ``ranges`` holds one list of physical ranges for each grain that is left."""

    def __init__(self, id_: int, grains: int) -> None:
        """Make room; nothing is taken yet. OSError where the kernel has no io_uring."""
        self.id = id_
        self.is_acked = False
        self.ranges: list[list[list[int]]] = []
        self._ring = Ring.open(grains)
        try:
            self._address = mman.map_for_huge_pages(grains * GRAIN_BYTES)
        except OSError:
            self._ring.close()
            raise
        self._mapped_bytes = grains * GRAIN_BYTES

    @property
    def bytes(self) -> int:
        """What it holds."""
        return len(self.ranges) * GRAIN_BYTES

    @property
    def ring_fd(self) -> int:
        """The ring that pins it, in this process."""
        return self._ring.fd

    def fill(self, pagemap: Pagemap, is_enough: Callable[[], bool]) -> None:
        """Take grain after grain, until all are there, ``is_enough`` says so, or memory is in too many pieces.

        Blocks. OSError if even the first cannot be had (ENOMEM), or frames cannot be seen (EPERM).
        """
        grains = self._mapped_bytes // GRAIN_BYTES
        pieces = 0
        while len(self.ranges) < grains and not (self.ranges and is_enough()):
            slot = len(self.ranges)
            address = self._address + slot * GRAIN_BYTES
            try:
                self._ring.pin(slot, address, GRAIN_BYTES)
                mman.forbid_access(address, GRAIN_BYTES)
                ranges = pagemap.ranges(address, GRAIN_BYTES)
            except OSError:
                if not self.ranges:
                    raise
                break
            pieces += len(ranges)
            if self.ranges and pieces > RANGES_MAX:
                break
            self.ranges.append(ranges)
        self._cut()

    def look_again(self, pagemap: Pagemap) -> list[list[list[int]]]:
        """The ranges as the kernel tells them now: the same, or the pin did not hold. OSError."""
        addresses = (self._address + slot * GRAIN_BYTES for slot in range(len(self.ranges)))
        return [pagemap.ranges(address, GRAIN_BYTES) for address in addresses]

    def release(self, grains: int) -> list[list[int]]:
        """Give back that many grains from the end, and return where they were. All of them are free on return."""
        if grains >= len(self.ranges):
            released, self.ranges = self.ranges, []
            self.close()
        else:
            kept = len(self.ranges) - grains
            released, self.ranges = self.ranges[kept:], self.ranges[:kept]
            self._cut()
        return [piece for ranges in released for piece in ranges]

    def close(self) -> None:
        """Give everything back, also what somebody else holds a copy of the ring of."""
        with contextlib.suppress(OSError):  # ENXIO: it was done already, by that other
            self._ring.unpin_all()
        self._ring.close()
        mman.unmap(self._address, self._mapped_bytes)
        self._mapped_bytes = 0

    def _cut(self) -> None:
        """Drop whatever is mapped or pinned beyond the last grain that counts."""
        for slot in range(len(self.ranges), self._mapped_bytes // GRAIN_BYTES):
            self._ring.unpin(slot)
        mman.unmap(self._address + self.bytes, self._mapped_bytes - self.bytes)
        self._mapped_bytes = self.bytes
