"""Runs inside the demo's guest: a program that needs memory, more and more of it, and then does its work on all of it.

    demo_growth.py NEEDED_BYTES

It takes STEP_BYTES at a time and writes each page; with all of it in hand it reads back what it wrote. Prints a JSON
object: {"started-s": CLOCK_REALTIME in seconds, "steps": [such a moment for each step that it had], "wrong": pages that
did not hold what was written, "least-available-bytes": the least MemAvailable between two steps}.
"""

import json
import mmap
import re
import struct
import sys
import time
from pathlib import Path

STEP_BYTES = 4 << 20
PAUSE_S = 0.02  # 200 MiB/s at most: a program that starts, not one that only wants to be killed
PAGE_BYTES = 4096
OOM_SCORE = 500  # if anybody is killed, then we


def available_bytes() -> int:
    """What the kernel says that programs can still get."""
    found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    if found is None:
        sys.exit("/proc/meminfo names no MemAvailable")
    return 1024 * int(found[1])


def take(number: int) -> mmap.mmap:
    """Another piece of memory, each of its pages with a number of its own."""
    piece = mmap.mmap(-1, STEP_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for page in range(0, STEP_BYTES, PAGE_BYTES):
        struct.pack_into("QQ", piece, page, number, page)
    return piece


def count_wrong(pieces: list[mmap.mmap]) -> int:
    """How many pages do not hold what was written to them."""
    return sum(
        struct.unpack_from("QQ", piece, page) != (number, page)
        for number, piece in enumerate(pieces)
        for page in range(0, STEP_BYTES, PAGE_BYTES)
    )


def main() -> None:
    """Grow, work, tell, and end."""
    needed_bytes = int(sys.argv[1])
    Path("/proc/self/oom_score_adj").write_text(str(OOM_SCORE))
    started_s, least_bytes = time.time(), available_bytes()
    pieces: list[mmap.mmap] = []
    steps_s: list[float] = []
    while len(pieces) * STEP_BYTES < needed_bytes:
        pieces.append(take(len(pieces)))
        steps_s.append(time.time())
        least_bytes = min(least_bytes, available_bytes())
        time.sleep(PAUSE_S)
    told = {"started-s": started_s, "steps": steps_s, "wrong": count_wrong(pieces)}
    print(json.dumps(told | {"least-available-bytes": least_bytes}))


if __name__ == "__main__":
    main()
