"""The process that takes memory blocks offline.

The kernel tries again for ever while a page cannot be moved, and only a signal ends that (mm/memory_hotplug.c,
offline_pages). So a child writes, with a deadline, and not a thread of ours.
"""

from __future__ import annotations

import asyncio
import errno
import sys
from collections.abc import Sequence
from pathlib import Path

# One block after another, up to the first that fails. The exit status is its errno, none of which is above 255.
_PROGRAM = """
import os, sys
for path in sys.argv[1:]:
    try:
        os.write(os.open(path, os.O_WRONLY), b"offline")
    except OSError as error:
        sys.exit(error.errno)
"""


async def take_offline(states: Sequence[Path], timeout_s: float) -> int:
    """Write "offline" to these ``state`` files in their order, until one fails.

    Returns 0 or the errno: ETIMEDOUT at the deadline, ECHILD if somebody killed the child. Which blocks are offline
    then is for sysfs to say. When this returns or is cancelled, nobody is writing any more.
    """
    if timeout_s <= 0:
        return errno.ETIMEDOUT
    try:
        child = await asyncio.create_subprocess_exec(sys.executable, "-I", "-S", "-c", _PROGRAM, *map(str, states))
    except OSError as error:  # no memory for another process
        return error.errno or errno.ENOMEM
    try:
        async with asyncio.timeout(timeout_s):
            status = await child.wait()
    except TimeoutError:
        return errno.ETIMEDOUT
    finally:
        if child.returncode is None:
            child.kill()
            await child.wait()  # the kernel looks for signals between two pages
    return errno.ECHILD if status < 0 else status
