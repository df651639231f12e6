"""Runs inside the guest: fills free memory, and knows what must be in it. Told what to do by lines in IN.

    checker.py IN OUT

``grab MIB`` fills memory until only that much is free; ``press MIB`` until only so much is available, file contents
included; ``drop MIB`` gives back until so much is free; ``check`` looks at every page.
Each is answered by one line of JSON in OUT: {"pages": held, "mib_per_s", "bad": [[page, frame, first bytes]]}.

A page that was punched behind our back reads as zero; one that two have been given holds what the other has written.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import struct
import sys
import time
from pathlib import Path

PAGE = mmap.PAGESIZE
MIB = 1 << 20
PIECE = 4 * MIB
# Blocks of noise, a prime number of them: neighbours are never alike. Copied and compared whole, by libc.
NOISE = [os.urandom(MIB) for _ in range(7)]
BAD_MAX = 50
libc = ctypes.CDLL(None)
libc.memmove.argtypes = libc.memcmp.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t)


def left_mib(name: str) -> int:
    """A line of /proc/meminfo: MemFree, which nobody uses, not even for the contents of files; or MemAvailable."""
    return int(Path("/proc/meminfo").read_text().split(f"{name}:")[1].split()[0]) // 1024


class Checker:
    """The pieces that are held."""

    def __init__(self) -> None:
        self._pieces: list[mmap.mmap] = []
        self._made = 0
        self._numbers: list[int] = []

    @property
    def pages(self) -> int:
        """How many pages are held."""
        return len(self._pieces) * PIECE // PAGE

    def grab(self, mib: int) -> list[object]:
        """Fill until only that much is free."""
        while left_mib("MemFree") >= mib + PIECE // MIB:
            self._fill_one()
        return []

    def press(self, mib: int) -> list[object]:
        """Fill until no more than that is available, and one piece more."""
        self._fill_one()
        while left_mib("MemAvailable") > mib:
            self._fill_one()
        return []

    def _fill_one(self) -> None:
        piece = mmap.mmap(-1, PIECE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        for number in range(PIECE // MIB):
            libc.memmove(address_of(piece) + number * MIB, NOISE[(self._made + number) % len(NOISE)], MIB)
        self._pieces.append(piece)
        self._numbers.append(self._made)
        self._made += 1

    def check(self) -> list[object]:
        """Pages that are not as they were filled."""
        bad: list[object] = []
        for piece, made in zip(self._pieces, self._numbers, strict=True):
            for number in range(PIECE // MIB):
                noise = NOISE[(made + number) % len(NOISE)]
                if libc.memcmp(address_of(piece) + number * MIB, noise, MIB) != 0:
                    bad += self._describe(piece, number * MIB, noise)
        return bad[:BAD_MAX]

    def drop(self, mib: int) -> list[object]:
        """Give back, the newest first, until so much is free."""
        while self._pieces and left_mib("MemFree") < mib:
            self._pieces.pop().close()
            self._numbers.pop()
        return []

    def _describe(self, piece: mmap.mmap, start: int, noise: bytes) -> list[object]:
        found: list[object] = []
        for offset in range(0, MIB, PAGE):
            page = piece[start + offset : start + offset + PAGE]
            if page != noise[offset : offset + PAGE]:
                found.append([start + offset, frame(piece, start + offset), page[:16].hex()])
        return found


def address_of(piece: mmap.mmap) -> int:
    """Where a piece begins."""
    return ctypes.addressof(ctypes.c_char.from_buffer(piece))


def frame(piece: mmap.mmap, offset: int) -> int:
    """The physical address of a page of ours (Documentation/admin-guide/mm/pagemap.rst)."""
    address = address_of(piece) + offset
    with Path("/proc/self/pagemap").open("rb", buffering=0) as pagemap:
        pagemap.seek(address // PAGE * 8)
        (entry,) = struct.unpack("Q", pagemap.read(8))
    return int(entry & ((1 << 55) - 1)) * PAGE


def main() -> None:
    """Obey line after line."""
    orders, answers = map(Path, sys.argv[1:])
    for fifo in (orders, answers):
        fifo.unlink(missing_ok=True)
        os.mkfifo(fifo)
    Path("/proc/self/oom_score_adj").write_text("900")  # after the balloon's holder, before anybody else
    checker = Checker()
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    while True:
        with orders.open() as lines:
            order, *arguments = lines.read().split()
        started_s = time.monotonic()
        bad = getattr(checker, order)(*map(int, arguments))
        elapsed_s = max(time.monotonic() - started_s, 0.001)
        answer = {"pages": checker.pages, "mib_per_s": round(checker.pages * PAGE / MIB / elapsed_s), "bad": bad}
        with answers.open("w") as out:
            out.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
