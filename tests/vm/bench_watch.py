"""Runs inside the guest: hears what the kernel says of memory blocks, and when, until enough of them are online.

    bench_watch.py BLOCKS READY

By the kernel's uevents, which are the same whoever brings a block online. Makes the file READY when it listens, and
prints {"added", "online": [CLOCK_REALTIME in seconds of each block]} at the end.
"""

from __future__ import annotations

import ctypes
import json
import os
import socket
import sys
import time
from pathlib import Path

NETLINK_KOBJECT_UEVENT, KERNELS_GROUP = 15, 1  # linux/netlink.h, lib/kobject_uevent.c
SO_RCVBUFFORCE, MCL_CURRENT = 33, 1
BUFFER_BYTES = 4 << 20
PLACE = "@/devices/system/memory/memory"
TIMEOUT_S = 90.0


def main() -> None:
    """Listen."""
    wanted, ready = int(sys.argv[1]), Path(sys.argv[2])
    # The moment when something is heard shall be when it was said, also where memory is short.
    os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    ctypes.CDLL(None).mlockall(MCL_CURRENT)
    listener = socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, NETLINK_KOBJECT_UEVENT)
    listener.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, BUFFER_BYTES)
    listener.bind((0, KERNELS_GROUP))
    listener.settimeout(TIMEOUT_S)
    ready.touch()
    heard: dict[str, list[float]] = {"add": [], "online": []}
    while len(heard["online"]) < wanted:
        said = listener.recv(1 << 14)
        now_s = time.time()
        action, place, _ = said.split(b"\0")[0].decode().partition(PLACE)
        if place and action in heard:
            heard[action].append(now_s)
    sys.stdout.write(json.dumps({"added": heard["add"], "online": heard["online"]}) + "\n")


if __name__ == "__main__":
    main()
