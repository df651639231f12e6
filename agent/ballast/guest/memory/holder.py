"""The holder: owns the balloon's pages, does what the agent says, and survives it.

A process of its own with ``OOMScoreAdjust=1000``: when all else fails the kernel kills it first, and all of its memory
is the guest's again. It takes and gives back, and decides nothing. One client at a time, the agent; a new one takes the
place of the old, whose end is only not heard yet. It leaves when it holds nothing and nobody is connected.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import struct
import sys
from collections.abc import Callable
from typing import Any

from ballast.guest.linux import mman
from ballast.guest.linux.notify import listen_fds
from ballast.guest.linux.pagemap import Pagemap
from ballast.guest.linux.pidfd import allow_tracer
from ballast.guest.memory import holder_protocol as protocol
from ballast.guest.memory.chunk import Chunk
from ballast.guest.memory.holder_protocol import CHUNK_BYTES, GRAIN_BYTES

IDLE_EXIT_S = 60.0
_UCRED = struct.Struct("3i")
# The agent asks one thing at a time, so it reads an answer at once or never: it is stopped, and another may come.
_SEND_S = 5.0


class Holder:
    """The chunks, oldest first, and the loop that serves them."""

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        self._client: socket.socket | None = None
        self._chunks: list[Chunk] = []
        self._pagemap = Pagemap()
        # No id comes twice in a guest's life, so that no ack can be taken for that of another holder's chunk. A number
        # that any JSON reader takes whole.
        self._last_id = int.from_bytes(os.urandom(6)) << 4
        self._generation = self._last_id
        self._operations: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
            "take": self._take,
            "ack": self._ack,
            "release": self._release,
            "ranges": self._ranges,
        }

    def run(self) -> None:
        """Serve until nothing is held and nobody is there."""
        while True:
            waiting = [self._listener] if self._client is None else [self._listener, self._client]
            ready, _, _ = select.select(waiting, [], [], IDLE_EXIT_S)
            if self._listener in ready:
                self._accept()
            elif self._client in ready:
                self._serve()
                if self._client is None and not self._chunks:
                    return
            elif self._client is None and not self._chunks:
                return

    def _total_bytes(self) -> int:
        return sum(chunk.bytes for chunk in self._chunks)

    def _unacked(self) -> Chunk | None:
        return next((chunk for chunk in self._chunks if not chunk.is_acked), None)

    def _accept(self) -> None:
        client, _ = self._listener.accept()
        pid, uid, _gid = _UCRED.unpack(client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
        if uid != os.geteuid():
            client.close()
            return
        self._hang_up()
        allow_tracer(pid)  # it copies the ring of a chunk that waits for its ack
        client.settimeout(_SEND_S)
        self._client = client
        waiting = self._unacked()
        chunk = _describe(waiting) if waiting else None
        self._tell({"event": "hello", "version": protocol.VERSION, "pid": os.getpid(), "chunk": chunk})

    def _hang_up(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None

    def _tell(self, message: dict[str, Any]) -> None:
        """Answer, with what is held now."""
        assert self._client is not None
        state = {"total_bytes": self._total_bytes(), "generation": self._generation}
        try:
            protocol.send(self._client, message | state)
        except OSError:
            self._hang_up()

    def _serve(self) -> None:
        assert self._client is not None
        try:
            message = protocol.receive(self._client)
            if message is None:
                self._hang_up()
            elif message["op"] != "hurry":
                self._tell(self._operations[message["op"]](message))
        except (LookupError, TypeError, ValueError):  # nonsense: no agent of ours
            self._hang_up()
        except OSError as error:
            self._tell({"event": "failed", "errno": error.errno, "operation": str(error)})

    def _is_called(self) -> bool:
        """Whether somebody waits for us to end what we do."""
        sockets = [self._listener] if self._client is None else [self._listener, self._client]
        return bool(select.select(sockets, [], [], 0)[0])

    def _take(self, message: dict[str, Any]) -> dict[str, Any]:
        waiting = self._unacked()
        if waiting is None:
            grains = min(int(message["bytes"]), CHUNK_BYTES) // GRAIN_BYTES
            if grains <= 0:
                raise ValueError("less than a grain")
            self._last_id += 1
            waiting = Chunk(self._last_id, grains)
            try:
                waiting.fill(self._pagemap, self._is_called)
            except OSError:
                waiting.close()
                raise
            self._chunks.append(waiting)
            self._generation += 1
        return {"event": "taken", "chunk": _describe(waiting)}

    def _find(self, id_: int) -> Chunk | None:
        return next((chunk for chunk in self._chunks if chunk.id == id_), None)

    def _ack(self, message: dict[str, Any]) -> dict[str, Any]:
        chunk = self._find(message["chunk"])
        if chunk is not None:
            chunk.is_acked = True
        return {"event": "acked", "known": chunk is not None}

    def _release(self, message: dict[str, Any]) -> dict[str, Any]:
        """Give back up to ``bytes``, rounded up to grains, of one chunk; the agent asks again for more."""
        wanted = -(-int(message["bytes"]) // GRAIN_BYTES)
        if message["of"] == "acked":
            chunk = next((chunk for chunk in reversed(self._chunks) if chunk.is_acked), None)
        else:
            chunk = self._find(message["of"])
        before_bytes = self._total_bytes()
        ranges: list[list[int]] = []
        if chunk is not None and wanted > 0:
            self._generation += 1
            if wanted * GRAIN_BYTES >= chunk.bytes:
                self._chunks.remove(chunk)
            ranges = chunk.release(wanted)
        return {"event": "released", "bytes": before_bytes - self._total_bytes(), "ranges": ranges}

    def _ranges(self, message: dict[str, Any]) -> dict[str, Any]:
        """The first chunk after that id: ids rise."""
        chunk = next((chunk for chunk in self._chunks if chunk.id > message["after"]), None)
        if chunk is None:
            return {"event": "ranges", "chunk": None, "moved": False}
        moved = chunk.look_again(self._pagemap) != chunk.ranges
        return {"event": "ranges", "chunk": _describe(chunk), "moved": moved}


def _describe(chunk: Chunk) -> list[Any]:
    return [chunk.id, chunk.bytes, [piece for ranges in chunk.ranges for piece in ranges], chunk.ring_fd]


def main() -> int:
    """Run on the socket that systemd passes; exit status 0."""
    fds = listen_fds()
    if not fds:
        sys.stderr.write("ballast-balloon: no socket from systemd: it is started by ballast-balloon.socket\n")
        return 2
    # Our own code and data only, and before anything is taken: it must answer when nothing else can be read any more.
    with contextlib.suppress(OSError):
        mman.lock_present_memory()
    # Stopping it is giving all of it back, which its end does by itself.
    signal.signal(signal.SIGTERM, lambda _number, _frame: sys.exit(0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    Holder(socket.socket(fileno=fds[0])).run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
