"""A disk from one NBD server to another: a point in time, from the machine; an image, from ``images.serve``.

By libnbd, two threads: one reads, one writes. A target that is slow, full or hangs stops only these.
"""

from __future__ import annotations

import asyncio
import errno
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ballast.host.machine import NotReclaimable
from ballast.host.storage.source import BackupFailed, Export

STALL_S = 60.0
_REQUEST_BYTES = 2 << 20
_AHEAD = 4
# So that what a slow target has yet to write at the end takes it less than STALL_S.
_FLUSH_BYTES = 256 << 20
_ALLOCATION = "base:allocation"
_DIRTY, _ZERO = 1, 2  # NBD_STATE_DIRTY of qemu:dirty-bitmap, NBD_STATE_ZERO of base:allocation
_LOOK_S = 0.2
# A snapshot that was broken answers EACCES, and QEMU's NBD server has no word for that but EINVAL.
_GIVEN_UP = (errno.EACCES, errno.EINVAL, errno.EIO)


@dataclass(frozen=True, slots=True)
class Extent:
    """A piece of a disk that is to be copied."""

    offset: int
    bytes: int
    is_zero: bool


class Stopped(Exception):
    """The copy was given up from outside."""


@dataclass
class _Copy:
    """One copy under way; ``moved`` grows with each request, and ``waits_for`` says who is to answer next."""

    export: Export
    target: Path
    rate_bytes_s: int | None
    advance: Callable[[int], None]
    moved: int = 0
    waits_for: str = "the machine"
    sockets: list[socket.socket] = field(default_factory=list)
    is_stopped: threading.Event = field(default_factory=threading.Event)

    def run(self) -> int:
        """Copy all; how many bytes. Blocks; BackupFailed, Stopped."""
        source = self._connect(self.export.socket, self.export.name, [_ALLOCATION, self.export.bitmap])
        self.waits_for = "the target"
        sink = self._connect(self.target, "", [])
        self.waits_for = "the machine"
        try:
            extents = self._look(source)
            with _Reader(self, source, extents) as pieces:
                self._write(sink, pieces)
            self.waits_for = "the target"
            self.call("the target", sink.flush)
        except BaseException:
            self.hang_up()
            raise
        for client in (source, sink):
            with suppress(_library().Error):
                client.shutdown()
        return sum(extent.bytes for extent in extents)

    def stop(self) -> None:
        """Give the copy up, whatever it waits for."""
        self.is_stopped.set()
        self.hang_up()

    def hang_up(self) -> None:
        """Have every call that waits end with an error."""
        for one in self.sockets:
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Let go of what ``stop`` needed."""
        for one in self.sockets:
            one.close()

    def _connect(self, path: Path, name: str, contexts: Sequence[str | None]) -> Any:
        nbd = _library()
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sockets.append(connection)
        if self.is_stopped.is_set():
            raise Stopped
        client = nbd.NBD()
        # A disk of QEMU's may end within a sector, also where the target is encrypted; QEMU completes it.
        client.set_strict_mode(client.get_strict_mode() & ~nbd.STRICT_ALIGN)
        client.set_export_name(name)
        for context in filter(None, contexts):
            client.add_meta_context(context)
        try:
            connection.connect(str(path))
            client.connect_socket(connection.dup().detach())
        except (OSError, nbd.Error) as error:
            raise BackupFailed(f"{path}: no NBD: {error}") from error
        for context in filter(None, contexts):
            if not client.can_meta_context(context):
                raise BackupFailed(f"{path}: the machine does not tell {context} of {name}")
        return client

    def _look(self, source: Any) -> list[Extent]:
        """What is to be copied: of a full backup all that is not zero, of an increment what its bitmap marks."""
        size = source.get_size()
        zero = self._map(source, _ALLOCATION, size, _ZERO)
        if self.export.bitmap is None:
            return [Extent(offset, bytes_, is_zero=False) for offset, bytes_, is_zero in zero if not is_zero]
        dirty = [
            (offset, bytes_)
            for offset, bytes_, is_dirty in self._map(source, self.export.bitmap, size, _DIRTY)
            if is_dirty
        ]
        return list(_cross(dirty, zero))

    def _map(self, source: Any, context: str, size: int, bit: int) -> list[tuple[int, int, bool]]:
        found: list[tuple[int, int, bool]] = []

        def note(name: str, offset: int, entries: Sequence[int], _error: Any) -> int:
            if name == context:
                for bytes_, flags in zip(entries[::2], entries[1::2], strict=True):
                    found.append((offset, min(bytes_, size - offset), bool(flags & bit)))
                    offset += bytes_
            return 0

        at = 0
        while at < size:
            self.call("the machine", source.block_status, min(size - at, 1 << 30), at, note)
            at = found[-1][0] + found[-1][1]
            self.moved += 1
        return found

    def _write(self, sink: Any, pieces: Iterator[tuple[Extent, bytes | None]]) -> None:
        due_s, unflushed_bytes = time.monotonic(), 0
        for extent, data in pieces:
            self.waits_for = "the target"
            if data is None:
                self.call("the target", sink.zero, extent.bytes, extent.offset)
            else:
                self.call("the target", sink.pwrite, data, extent.offset)
                unflushed_bytes += extent.bytes
            self.moved += 1
            if unflushed_bytes >= _FLUSH_BYTES:
                self.call("the target", sink.flush)
                unflushed_bytes = 0
            self.moved += 1
            self.waits_for = "the machine"
            self.advance(extent.bytes)
            if self.rate_bytes_s and data is not None:
                due_s = max(due_s, time.monotonic() - 1) + extent.bytes / self.rate_bytes_s
                self._wait_until(due_s)

    def _wait_until(self, due_s: float) -> None:
        while (left_s := due_s - time.monotonic()) > 0:
            self.moved += 1  # it is we who wait
            if self.is_stopped.wait(min(left_s, _LOOK_S)):
                raise Stopped

    def call(self, who: str, call: Callable[..., Any], *arguments: Any) -> Any:
        """Call libnbd, and tell by its error who is to blame. BackupFailed, Stopped."""
        try:
            return call(*arguments)
        except _library().Error as error:
            if self.is_stopped.is_set():
                raise Stopped from error
            if who == "the target":
                raise BackupFailed(f"the target cannot be written to: {error.string}") from error
            if error.errnum in _GIVEN_UP:
                raise BackupFailed(
                    "the machine gave the point in time up: the fleece could not take the guest's old blocks in time"
                ) from error
            raise BackupFailed(f"the machine's disk cannot be read: {error.string}") from error


class _Reader:
    """A thread that reads ahead; the context is an iterator over what it has read."""

    def __init__(self, copy_: _Copy, source: Any, extents: Sequence[Extent]) -> None:
        self._copy = copy_
        self._source = source
        self._extents = extents
        self._queue: queue.Queue[tuple[Extent, bytes | None] | None] = queue.Queue(_AHEAD)
        self._thread = ThreadPoolExecutor(1, "reader of a backup")
        self._is_over = threading.Event()

    def __enter__(self) -> Iterator[tuple[Extent, bytes | None]]:
        return self._pieces(self._thread.submit(self._read))

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._is_over.set()
        if kind is not None:
            self._copy.hang_up()  # it may wait for a machine that hangs
        self._thread.shutdown()

    def _pieces(self, reading: Future[None]) -> Iterator[tuple[Extent, bytes | None]]:
        while (piece := self._queue.get()) is not None:
            yield piece
        reading.result()

    def _read(self) -> None:
        try:
            for piece in (piece for extent in self._extents for piece in _requests(extent)):
                if self._is_over.is_set():
                    return
                call = self._source.pread
                data = None if piece.is_zero else self._copy.call("the machine", call, piece.bytes, piece.offset)
                self._put((piece, data))
        finally:
            self._put(None)

    def _put(self, piece: tuple[Extent, bytes | None] | None) -> None:
        while not self._is_over.is_set():
            with suppress(queue.Full):
                self._queue.put(piece, timeout=_LOOK_S)
                return


async def copy(
    export: Export,
    target: Path,
    *,
    rate_bytes_s: int | None = None,
    advance: Callable[[int], None] = lambda _: None,
    stall_s: float = STALL_S,
) -> int:
    """Copy a disk, or what its bitmap marks, and flush it; how many bytes. BackupFailed; NotReclaimable without libnbd.

    ``advance`` is told of bytes, in another thread. Given up when nothing moves for ``stall_s``.
    """
    work = _Copy(export, target, rate_bytes_s, advance)
    running = asyncio.ensure_future(asyncio.to_thread(work.run))
    clock = asyncio.get_running_loop().time
    moved, since_s = 0, clock()
    try:
        while not (await asyncio.wait({running}, timeout=_LOOK_S))[0]:
            if work.moved != moved:
                moved, since_s = work.moved, clock()
            elif clock() - since_s > stall_s:
                who = work.waits_for
                raise BackupFailed(f"{export.disk}: {who} has not answered for {stall_s:g} s")
        return await running
    finally:
        work.stop()
        await asyncio.wait({running})
        work.close()
        running.exception()  # it is of no interest where another one is on its way


def _requests(extent: Extent) -> Iterator[Extent]:
    """Cut into what is asked for at once."""
    limit = 1 << 30 if extent.is_zero else _REQUEST_BYTES
    end = extent.offset + extent.bytes
    for offset in range(extent.offset, end, limit):
        yield Extent(offset, min(limit, end - offset), extent.is_zero)


def _cross(dirty: Sequence[tuple[int, int]], zero: Sequence[tuple[int, int, bool]]) -> Iterator[Extent]:
    """The dirty pieces, cut where they begin or end to be zero. Both rise and do not overlap themselves."""
    index = 0
    for offset, bytes_ in dirty:
        end = offset + bytes_
        while offset < end:
            while zero[index][0] + zero[index][1] <= offset:
                index += 1
            start, length, is_zero = zero[index]
            stop = min(end, start + length)
            yield Extent(offset, stop - offset, is_zero)
            offset = stop


def _library() -> Any:
    try:
        import nbd
    except ImportError as error:
        raise NotReclaimable(
            "this needs the Python library nbd (package python3-libnbd), which is not installed"
        ) from error
    return nbd
