"""Before the freeze: descriptors, and as little dirty data as possible. All that needs a working disk is here."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Callable, Sequence

from ballast.guest.linux import fsfreeze
from ballast.guest.quiesce.forecast import FileSystem
from ballast.guest.quiesce.leftovers import open_filesystem
from ballast.guest.threads import in_thread
from ballast.wire.errors import AgentError, DeadlineExceeded, KernelFailure


async def open_filesystems(filesystems: Sequence[FileSystem], *, timeout_s: float) -> list[int]:
    """Open each in a thread, since a path can lead through a dead network mount; the descriptors are the caller's.

    KernelFailure or DeadlineExceeded names every one that fails, and then none is open.
    """
    opens = [in_thread(_opener(one), name="quiesce-open", discard=os.close) for one in filesystems]
    troubles: list[AgentError] = []
    deadline_s = time.monotonic() + timeout_s
    with contextlib.ExitStack() as opened:
        fds: list[int] = []
        for filesystem, opening in zip(filesystems, opens, strict=True):
            try:
                async with asyncio.timeout(max(0.0, deadline_s - time.monotonic())):
                    fd = await opening
                fds.append(fd)
                opened.callback(os.close, fd)
            except TimeoutError:
                troubles.append(DeadlineExceeded(f"failed to open {filesystem.mountpoint}: it does not answer"))
            except OSError as error:
                troubles.append(KernelFailure.of("open", filesystem.mountpoint, error))
        if troubles:
            raise type(troubles[0])("; ".join(trouble.desc for trouble in troubles), **troubles[0].data)
        opened.pop_all()
        return fds


async def sync_filesystems(fds: Sequence[int], *, timeout_s: float) -> float:
    """Write out what is dirty, all file systems at once; seconds that it took.

    Out of time is no error: the freeze itself will have to write the rest.
    """
    started_s = time.monotonic()
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(timeout_s):
            for done in [in_thread(_syncer(fd), name="quiesce-sync") for fd in fds]:
                with contextlib.suppress(OSError):  # FIFREEZE will say it with more right
                    await done
    return time.monotonic() - started_s


def _opener(filesystem: FileSystem) -> Callable[[], int]:
    return lambda: open_filesystem(list(filesystem.mountpoints), filesystem.device)


def _syncer(fd: int) -> Callable[[], None]:
    """Sync by a descriptor of its own: the pass may be given up, and the hold close ``fd``, while it still runs."""
    own = os.dup(fd)

    def sync() -> None:
        try:
            fsfreeze.sync(own)
        finally:
            os.close(own)

    return sync
