"""JSON lines over a stream socket, as the lab's shell and QEMU's monitor (QMP) both speak them.

Answers find their request by its "id", so that calls of several threads may overlap; lines without one are events.
"""

import json
import queue
import socket
import threading
import uuid
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

Line = dict[str, Any]


class Channel:
    """The client's end of a connection, with a thread that reads it until it is closed."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._sending = threading.Lock()
        self._waiting: dict[str, Future[Line]] = {}
        self._events: queue.SimpleQueue[Line | None] = queue.SimpleQueue()
        self._closed = threading.Event()
        self._reader = threading.Thread(target=self._read, name="lab channel", daemon=True)
        self._reader.start()

    def call(self, request: Line, *, timeout_s: float) -> Line:
        """Send a request and return its answer. Raises TimeoutError, or ConnectionError once the other end is gone."""
        answer: Future[Line] = Future()
        call_id = uuid.uuid4().hex
        self._waiting[call_id] = answer
        try:
            if self._closed.is_set():
                raise _closed()
            with self._sending:
                self._socket.sendall(json.dumps({**request, "id": call_id}).encode() + b"\n")
            return answer.result(timeout_s)
        finally:
            del self._waiting[call_id]

    def next_event(self, *, timeout_s: float) -> Line:
        """Take the oldest event that nobody took. Raises TimeoutError, or ConnectionError once there will be none."""
        try:
            event = self._events.get(timeout=max(timeout_s, 0))
        except queue.Empty:
            raise TimeoutError(f"no event within {timeout_s} s") from None
        if event is None:
            raise _closed()
        return event

    def close(self) -> None:
        """End the connection and its thread."""
        if not self._closed.is_set():
            self._socket.shutdown(socket.SHUT_RDWR)
        self._reader.join()
        self._socket.close()

    def _read(self) -> None:
        # A process that is killed with something unread resets the connection instead of ending it.
        with suppress(ConnectionError), self._socket.makefile("rb") as lines:
            for text in lines:
                line = json.loads(text)
                if answer := self._waiting.get(line.get("id")):
                    answer.set_result(line)
                elif "id" not in line:
                    self._events.put(line)
        self._closed.set()
        self._events.put(None)
        for answer in list(self._waiting.values()):
            if not answer.done():
                answer.set_exception(_closed())


def _closed() -> ConnectionError:
    return ConnectionResetError("the other end has closed the channel")
