"""Runs inside the demo's guest: takes memory until little is left, then needs more file pages than find room.

    demo_load.py SPARE_BYTES FILE_BYTES FILE LOG

It makes FILE, leaves SPARE_BYTES of what MemAvailable promises and reads FILE at random: there is always something to
reclaim, so nobody is killed, and everybody waits for pages that were there a moment ago. A second process appends
(CLOCK_REALTIME in seconds, the microseconds that some task has waited for memory) to LOG every few milliseconds.
"""

import ctypes
import mmap
import os
import random
import re
import struct
import sys
import time
from pathlib import Path

SAMPLE_S = 0.005
READERS = 3  # processes, since a thread that waits for a page keeps Python's lock
MADV_POPULATE_WRITE = 23  # include/uapi/asm-generic/mman-common.h
MCL_CURRENT = 1


def sample(log: str) -> None:
    """Write down the stall total for ever, from locked memory: what measures the waiting must not wait itself."""
    if ctypes.CDLL(None, use_errno=True).mlockall(MCL_CURRENT) != 0:
        sys.exit(f"mlockall: {os.strerror(ctypes.get_errno())}")
    pressure = os.open("/proc/pressure/memory", os.O_RDONLY)
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    while True:
        some = os.pread(pressure, 4096, 0).split(b"\n")[0]
        os.write(out, struct.pack("dq", time.time(), int(some.split(b"total=")[1])))
        time.sleep(SAMPLE_S)


def make_file(path: Path, bytes_: int) -> mmap.mmap:
    """A file that is gone with us, and nowhere in memory yet.

    No block device would do: its pages may not be in movable memory, so that what is plugged in brings it no relief.
    """
    with path.open("wb+") as file:
        path.unlink()
        chunk = random.randbytes(1 << 20)
        for _ in range(0, bytes_, len(chunk)):
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return mmap.mmap(file.fileno(), bytes_, prot=mmap.PROT_READ)


def fill(spare_bytes: int) -> mmap.mmap:
    """Take all available memory but `spare_bytes`."""
    found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    if found is None:
        sys.exit("/proc/meminfo names no MemAvailable")
    memory = mmap.mmap(-1, int(found[1]) * 1024 - spare_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(MADV_POPULATE_WRITE)
    return memory


def read_for_ever(pages: mmap.mmap) -> None:
    """Touch a byte here and there."""
    while True:
        for _ in range(64):
            pages[random.randrange(len(pages))]


def main() -> None:
    """Never returns."""
    spare_bytes, file_bytes, file, log = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
    if os.fork() == 0:
        sample(log)
    pages = make_file(Path(file), file_bytes)
    memory = fill(spare_bytes)
    for _ in range(READERS):
        if os.fork() == 0:
            read_for_ever(pages)
    os.wait()
    memory.close()


if __name__ == "__main__":
    main()
