"""Runs inside the guest: a fixed amount of work for the processor and for memory, by two processes at once.

    bench_work.py ROUNDS BYTES

Each process writes and reads all of its half of BYTES in each round. Prints {"started-s", "ended-s"} (CLOCK_REALTIME).
"""

from __future__ import annotations

import json
import mmap
import os
import sys
import time
import zlib

PROCESSES = 2
PIECE_BYTES = 1 << 20


def work(rounds: int, bytes_: int) -> None:
    """One process's part."""
    memory = mmap.mmap(-1, bytes_, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for number in range(rounds):
        piece = bytes([number % 256]) * PIECE_BYTES
        for at in range(0, bytes_, PIECE_BYTES):
            memory[at : at + PIECE_BYTES] = piece
        for at in range(0, bytes_, PIECE_BYTES):
            zlib.crc32(memory[at : at + PIECE_BYTES])


def main() -> None:
    """Do it, all of it."""
    rounds, bytes_ = int(sys.argv[1]), int(sys.argv[2])
    started_s = time.time()
    children = []
    for _ in range(PROCESSES):
        if (child := os.fork()) == 0:
            work(rounds, bytes_ // PROCESSES)
            os._exit(0)
        children.append(child)
    for child in children:
        if os.waitpid(child, 0)[1]:
            sys.exit("bench_work: a process has failed")
    sys.stdout.write(json.dumps({"started-s": started_s, "ended-s": time.time()}) + "\n")


if __name__ == "__main__":
    main()
