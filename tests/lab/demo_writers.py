"""Runs inside the demo's guest: a writer for each file system, with a log on a tmpfs of when each write was done.

    demo_writers.py LOG_FOLDER MOUNTPOINT...

Write number n goes to slot n % SLOTS of FILE and begins with n, so that a snapshot shows which writes it has. Done, its
time (CLOCK_REALTIME in seconds) is appended to LOG_FOLDER/<number of the mount point>. Each writer also holds a deleted
file open, since a freeze finds many of those in real life.
"""

import os
import struct
import sys
import time
from pathlib import Path

FILE, DELETED = ".ballast-demo", ".ballast-demo-deleted"
CHUNK_BYTES = 64 << 10
SLOTS = 1024
PAUSE_S = 0.002


def write_for_ever(mountpoint: Path, log: Path) -> None:
    """Buffered writes, one after the other, as somebody does who waits for each."""
    deleted = os.open(mountpoint / DELETED, os.O_WRONLY | os.O_CREAT, 0o600)
    os.write(deleted, bytes(CHUNK_BYTES))
    (mountpoint / DELETED).unlink()
    file = os.open(mountpoint / FILE, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    times = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    rest = bytes(CHUNK_BYTES - 8)
    number = 0
    while True:
        os.pwrite(file, struct.pack("Q", number) + rest, number % SLOTS * CHUNK_BYTES)
        os.write(times, struct.pack("d", time.time()))
        number += 1
        time.sleep(PAUSE_S)


def main() -> None:
    """Never returns: one process for each writer, so that none waits for another."""
    folder, *mountpoints = sys.argv[1:]
    for index, mountpoint in enumerate(mountpoints):
        if os.fork() == 0:
            write_for_ever(Path(mountpoint), Path(folder, str(index)))
    for _ in mountpoints:
        os.wait()


if __name__ == "__main__":
    main()
