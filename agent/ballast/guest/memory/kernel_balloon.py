"""The kernel's own balloon: told of in the status, and a reason for ours to stay empty.

Two balloons under two controllers take from the same floor, and neither knows of the other. But QEMU and libvirt give
each machine a virtio-balloon that mostly nobody uses: one that is only there is told of, and in nobody's way.
"""

from __future__ import annotations

import os
from typing import Literal

from ballast.guest.linux.balloon_drivers import (
    HV_BALLOON,
    find_driver,
    parse_balloon_kib,
    parse_counters,
    read_hv_ballooned_bytes,
)
from ballast.guest.linux.tree import Tree
from ballast.wire.memory_names import KernelBalloon

BalloonMode = Literal["auto", "always", "off"]


def kernel_balloon(tree: Tree) -> KernelBalloon | None:
    """The kernel's balloon and what it holds; None without one. May run while frozen.

    ``bytes`` is None where the kernel does not tell: hv_balloon's is in debugfs, until it is in /proc/meminfo.
    """
    driver = find_driver(tree)
    if driver is None:
        return None
    held_kib = parse_balloon_kib(tree.read("proc/meminfo"))
    held_bytes = None if held_kib is None else 1024 * held_kib
    if driver == HV_BALLOON:
        return KernelBalloon(driver, read_hv_ballooned_bytes(tree) if held_bytes is None else held_bytes)
    counters = parse_counters(tree.read("proc/vmstat"))
    if counters is None:
        return KernelBalloon(driver, held_bytes)
    page_bytes = os.sysconf("SC_PAGESIZE")
    inflated_bytes, deflated_bytes = counters.inflated_pages * page_bytes, counters.deflated_pages * page_bytes
    if held_bytes is None:
        held_bytes = max(0, inflated_bytes - deflated_bytes)
    return KernelBalloon(driver, held_bytes, inflated_bytes, deflated_bytes, counters.migrated_pages * page_bytes)


def refusal(tree: Tree, mode: BalloonMode) -> str | None:
    """Why ours takes nothing: it is switched off, or the kernel's holds something or has since boot. None: it may."""
    if mode == "off":
        return "the balloon is switched off in this guest (memory.balloon)"
    other = kernel_balloon(tree) if mode == "auto" else None
    if other is None or (other.bytes == 0 and not other.inflated_bytes):
        return None
    return (
        f"the kernel's own balloon ({other.driver}) is in use, and two would work against each other; "
        'memory.balloon = "always" in the guest\'s configuration allows it'
    )
