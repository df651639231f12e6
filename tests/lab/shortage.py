"""Memory that is short in a guest, without the guest having too little: a group that may hold less than it reads."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager

from tests.lab.guest import Guest

# Reads more of its file than its group may hold: it waits for its own pages all the time, and nobody else does.
HUNGRY = """
import mmap, os, random
file = os.open("/mnt/data0/hungry", os.O_RDWR | os.O_CREAT)
os.unlink("/mnt/data0/hungry")
for _ in range(64):
    os.write(file, random.randbytes(1 << 20))
os.fsync(file)
pages = mmap.mmap(file, 64 << 20, prot=mmap.PROT_READ)
while True:
    pages[random.randrange(len(pages))]
"""
# Holds 160 MiB and touches none of it again.
HOLD = "x = bytearray(b'x' * (160 << 20)); print('full', flush=True); import time; time.sleep(600)"
SWAP, HELD = "/root/lab-swap", "lab-hold"


@contextmanager
def hungry(guest: Guest, slice_: str) -> Iterator[None]:
    """A program of that slice that stalls, and then the unit is gone again."""
    run = ["systemd-run", "--quiet", "--unit=hungry", f"--slice={slice_}", "--property=MemoryHigh=24M"]
    guest.run([*run, "/usr/bin/python3", "-Ic", HUNGRY])
    try:
        yield
    finally:
        guest.run("systemctl kill --signal=KILL hungry; systemctl reset-failed hungry || true", check=False)


@contextmanager
def swap(guest: Guest) -> Iterator[None]:
    """256 MiB of swap."""
    guest.run(f"fallocate -l 256M {SWAP}; chmod 600 {SWAP}; mkswap -q {SWAP}; swapon {SWAP}", timeout_s=60)
    try:
        yield
    finally:
        guest.run(f"swapoff {SWAP}; rm {SWAP}", timeout_s=60)


@contextmanager
def held(guest: Guest) -> Iterator[None]:
    """A program that holds 160 MiB, in a unit of its own."""
    run = f"systemd-run --quiet --unit={HELD} --property=StandardOutput=file:/run/{HELD} /usr/bin/python3 -Ic"
    guest.run(f"{run} {shlex.quote(HOLD)}; until grep -q full /run/{HELD}; do sleep 0.1; done")
    try:
        yield
    finally:
        guest.run(f"systemctl stop {HELD}; rm /run/{HELD}")


def swap_out(guest: Guest) -> None:
    """Most of what it holds."""
    group = f"/sys/fs/cgroup/system.slice/{HELD}.service"
    guest.run(f"echo 120M >{group}/memory.reclaim || true", timeout_s=60)
