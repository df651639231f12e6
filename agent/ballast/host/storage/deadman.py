"""The dead man's switch of a backup: a process that cleans up when the one that makes the backup is killed.

It reads lines from a pipe: ``frozen ID``, ``thawed``, ``done``. When the pipe ends without ``done``, whoever wrote
there is gone: it thaws what it heard of last, at once, and then repairs, as ``ballastctl backup repair`` does. It is
in a session of its own, so that what a terminal sends to the backup does not reach it. If both are killed, the guest's
own lease thaws it, and the next backup repairs.
"""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager
from typing import IO, Self

from ballast.host.agent import Agent
from ballast.host.show import say
from ballast.wire.errors import AgentError, Busy

END_S = 10.0
_LOOK_S = 0.05


class DeadMan:
    """The end of the pipe that must not end without a word."""

    def __init__(self, pipe: IO[bytes]) -> None:
        self._pipe = pipe

    @classmethod
    @contextlib.contextmanager
    def started(cls, argv: Sequence[str]) -> Iterator[Self]:
        """Start one; ``argv`` are words for ballastctl, which listens. Leaving tells it that all is done."""
        process = subprocess.Popen(
            [sys.executable, "-m", "ballast.host.cli", *argv],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
        assert process.stdin is not None
        try:
            yield cls(process.stdin)
        finally:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(b"done\n")
                process.stdin.close()
            process.wait()

    @contextlib.asynccontextmanager
    async def watching(self, freeze: str) -> AsyncIterator[None]:
        """Have it know of a freeze as long as that may last."""
        self._say(f"frozen {freeze}")
        try:
            yield
        finally:
            self._say("thawed")

    def _say(self, line: str) -> None:
        # If it is gone the lease is left; a few bytes never fill the pipe.
        with contextlib.suppress(BrokenPipeError):
            self._pipe.write(f"{line}\n".encode())
            self._pipe.flush()


async def listen(
    connect: Callable[[], AbstractAsyncContextManager[Agent]], repair: Callable[[], Awaitable[None]]
) -> None:
    """Be the dead man: wait for the end of standard input, and do what is left to do."""
    frozen = None
    reader = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    async for line in reader:
        words = line.decode().split()
        if words == ["done"]:
            return None
        frozen = words[1] if words[0] == "frozen" else None
    if frozen is not None:
        try:
            async with asyncio.timeout(END_S), connect() as agent:
                await agent.quiesce_end(frozen)
        except (AgentError, TimeoutError) as error:
            say(f"the backup was killed, and its freeze cannot be ended; its lease ends it: {error}")
    # The lock of whoever was killed may be there for a moment longer than the pipe.
    deadline_s = loop.time() + END_S
    while True:
        try:
            return await repair()
        except Busy:
            if loop.time() > deadline_s:
                raise
            await asyncio.sleep(_LOOK_S)
