"""How many backups and freezes there may be at once on this host: locks on files, which the kernel lets go of."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
from collections.abc import AsyncIterator
from pathlib import Path

from ballast.wire.errors import Busy

FOLDER = Path("/run/lock/ballast")
_LOOK_S = 0.1


@contextlib.asynccontextmanager
async def slot(kind: str, count: int, patience_s: float, folder: Path = FOLDER) -> AsyncIterator[None]:
    """Hold one of ``count`` places of a kind (``backup``, ``freeze``) on this host; wait for one, then Busy."""
    with contextlib.ExitStack() as files:
        fds = [_open(folder, f"{kind}-{number}", files) for number in range(count)]
        deadline_s = asyncio.get_running_loop().time() + patience_s
        while not any(_locks(fd) for fd in fds):
            if asyncio.get_running_loop().time() > deadline_s:
                raise Busy(f"{count} {kind}s are under way on this host, and none ended within {patience_s:g} s")
            await asyncio.sleep(_LOOK_S)
        yield


def _open(folder: Path, name: str, files: contextlib.ExitStack) -> int:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    fd = os.open(folder / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    files.callback(os.close, fd)
    return fd


def _locks(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
