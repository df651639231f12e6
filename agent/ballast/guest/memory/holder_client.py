"""The agent's end of the socket to the holder: one request at a time, each answered within a deadline."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
import time
from collections.abc import Callable
from typing import Any

from ballast.guest.linux.pidfd import copy_descriptor
from ballast.guest.linux.tree import Tree
from ballast.guest.linux.uring import Ring
from ballast.guest.memory import holder_protocol as protocol
from ballast.wire.errors import AgentError, DeadlineExceeded, KernelFailure, NotSupported
from ballast.wire.memory_names import Ranges
from ballast.wire.names import ProcessState

_RETRY_S = 0.1
_HOLDER_CGROUP = "sys/fs/cgroup/ballast.slice/ballast-balloon.service/cgroup.procs"
_IO_URING_OFF = (errno.ENOSYS, errno.EPERM)


class HolderLost(AgentError):
    """The holder cannot be reached, or has gone and everything it held with it."""

    reason = "kernel"


class HeldChunk:
    """A chunk that waits for its ack, and our own copy of the ring that pins it."""

    def __init__(self, id_: int, bytes_: int, ranges: list[list[int]], ring: Ring) -> None:
        self.id = id_
        self.bytes = bytes_
        self.ranges = ranges
        self._ring = ring

    def let_go(self) -> None:
        """Close our copy: from now on it is the holder's alone."""
        self._ring.close()

    def release(self) -> None:
        """Give it back to the guest, now, when there is no holder any more that could."""
        with contextlib.suppress(OSError):  # ENXIO: the holder did it before it went
            self._ring.unpin_all()
        self._ring.close()


class HolderConnection:
    """One connection. ``total_bytes`` and ``generation`` are as of the last answer.

    ``lost(is_gone)`` is called when it ends and not we have closed it: the holder is gone, or does not answer.
    """

    def __init__(self, sock: socket.socket, lost: Callable[[bool], None]) -> None:
        self.total_bytes = 0
        self.generation = 0
        self._sock = sock
        self._lost = lost
        self._pid = 0
        self._messages: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        self._asking = asyncio.Lock()
        asyncio.get_running_loop().add_reader(sock.fileno(), self._readable)

    @classmethod
    async def open(
        cls, path: str, lost: Callable[[bool], None], *, timeout_s: float
    ) -> tuple[HolderConnection, HeldChunk | None]:
        """Connect, which makes systemd start the holder; with the chunk that waits for its ack, if there is one.

        HolderLost, DeadlineExceeded, KernelFailure. An earlier holder that is just leaving turns us away: try again.
        """
        deadline_s = time.monotonic() + timeout_s
        while True:
            try:
                return await cls._open_once(path, lost, timeout_s=max(0.0, deadline_s - time.monotonic()))
            except HolderLost:
                if time.monotonic() + _RETRY_S >= deadline_s:
                    raise
            await asyncio.sleep(_RETRY_S)

    @classmethod
    async def _open_once(
        cls, path: str, lost: Callable[[bool], None], *, timeout_s: float
    ) -> tuple[HolderConnection, HeldChunk | None]:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        try:
            sock.connect(path)
        except OSError as error:
            sock.close()
            raise HolderLost(f"cannot reach the balloon's holder at {path}: {error.strerror}") from error
        connection = cls(sock, lost)
        try:
            async with asyncio.timeout(timeout_s):
                hello = connection._take_in(await connection._messages.get())
            if hello["version"] > protocol.VERSION:
                raise NotSupported(f"the balloon's holder speaks version {hello['version']}, newer than ours")
            connection._pid = int(hello["pid"])
            return connection, connection._hold(hello["chunk"])
        except TimeoutError as error:
            connection.close()
            raise DeadlineExceeded("the balloon's holder does not start") from error
        except BaseException:
            connection.close()
            raise

    async def take(self, bytes_: int, *, timeout_s: float) -> HeldChunk:
        """Take a chunk of at most that much, and a copy of its ring.

        NotSupported without io_uring, KernelFailure (out of memory, in pieces too small).
        """
        answer = await self.ask({"op": "take", "bytes": bytes_}, timeout_s=timeout_s)
        chunk = self._hold(answer["chunk"])
        assert chunk is not None
        return chunk

    async def ask(self, message: dict[str, Any], *, timeout_s: float) -> dict[str, Any]:
        """Send a request and return its answer. HolderLost, DeadlineExceeded (and hangs up), KernelFailure."""
        async with self._asking:
            try:
                async with asyncio.timeout(timeout_s):
                    with contextlib.suppress(OSError):  # told by the end of the stream
                        protocol.send(self._sock, message)
                    answer = self._take_in(await self._messages.get())
            except TimeoutError as error:
                self._end(is_gone=False)
                raise DeadlineExceeded("the balloon's holder does not answer") from error
        if answer["event"] != "failed":
            return answer
        number, operation = int(answer["errno"]), str(answer["operation"])
        if number in _IO_URING_OFF and operation.startswith("io_uring"):
            raise NotSupported(f"this kernel lets nobody pin memory: {operation} (see kernel.io_uring_disabled)")
        if number == errno.EPERM and "pagemap" in operation:
            raise NotSupported("the balloon's holder cannot see where its memory is, for want of CAP_SYS_ADMIN")
        raise KernelFailure(f"the balloon cannot {message['op']}: {operation}", operation=operation, errno=number)

    def hurry(self) -> None:
        """Let a ``take`` that runs end with what it has."""
        with contextlib.suppress(OSError):
            protocol.send(self._sock, {"op": "hurry"})

    def close(self) -> None:
        """Hang up: the holder keeps what it holds, and leaves if that is nothing."""
        if self._sock.fileno() >= 0:
            asyncio.get_running_loop().remove_reader(self._sock.fileno())
            self._sock.close()

    def _take_in(self, message: dict[str, Any] | None) -> dict[str, Any]:
        if message is None:
            self._messages.put_nowait(None)  # for whoever asks after us
            raise HolderLost("the balloon's holder is gone, and the guest has its memory back")
        self.total_bytes = int(message["total_bytes"])
        self.generation = int(message["generation"])
        return message

    def _hold(self, described: list[Any] | None) -> HeldChunk | None:
        """Copy the ring of a chunk before anybody is told of it: then neither process's death can free it."""
        if described is None:
            return None
        id_, bytes_, ranges, fd = described
        try:
            return HeldChunk(id_, bytes_, ranges, Ring(copy_descriptor(self._pid, fd)))
        except OSError as error:
            raise KernelFailure.of("copy a ring of", "the balloon's holder", error) from error

    def _readable(self) -> None:
        try:
            message = protocol.receive(self._sock)
        except BlockingIOError:
            return
        except (OSError, ValueError):
            message = None
        if message is None:
            self._end(is_gone=True)
        else:
            self._messages.put_nowait(message)

    def _end(self, *, is_gone: bool) -> None:
        if self._sock.fileno() >= 0:
            self.close()
            self._messages.put_nowait(None)
            self._lost(is_gone)


def pin(tree: Tree) -> str | None:
    """How pages are pinned: "io_uring", or None where the administrator has switched it off."""
    try:
        return None if tree.read("proc/sys/kernel/io_uring_disabled") == "2" else "io_uring"
    except OSError:  # before Linux 6.6 there is no such switch
        return "io_uring"


def is_holder_running(tree: Tree) -> bool:
    """Whether there is one, without asking it."""
    try:
        return bool(tree.read(_HOLDER_CGROUP))
    except OSError:
        return False


def holder_state(tree: Tree, held_bytes: int) -> ProcessState:
    """Whether the holder holds something, waits, or is not running; without asking it."""
    if held_bytes:
        return "active"
    return "idle" if is_holder_running(tree) else "stopped"


def merged(ranges: Ranges) -> Ranges:
    """Rising, and with neighbours made one."""
    result: Ranges = []
    for address, bytes_ in sorted(ranges):
        if result and result[-1][0] + result[-1][1] == address:
            result[-1][1] += bytes_
        else:
            result.append([address, bytes_])
    return result
