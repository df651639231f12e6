"""The protocol of Redis and Valkey, RESP2, as far as the writer needs it.

https://redis.io/docs/latest/develop/reference/protocol-spec/
"""

from __future__ import annotations

import socket

from ballast.guest.writers.program import WriterError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from ballast.guest.writers.program import Request

_ANSWER_LIMIT_BYTES = 1 << 20


class ServerError(WriterError):
    """The server says no, in its own words."""


class Connection:
    """One connection. Nothing waits longer than the request may take."""

    def __init__(self, address: str | tuple[str, int], request: Request) -> None:
        """Connect to a socket's path, or a host and port. OSError, TimeoutError among them."""
        if isinstance(address, str):
            self._sock = socket.socket(socket.AF_UNIX)
        else:
            self._sock = socket.socket(socket.AF_INET6 if ":" in address[0] else socket.AF_INET)
        self._buffer = b""
        try:
            self._wait_at_most(request)
            self._sock.connect(address)
        except BaseException:
            self._sock.close()
            raise

    def command(self, request: Request, *words: str) -> Any:
        """The answer: text, a number, None, or a list of these. ServerError, OSError, TimeoutError among them."""
        encoded = [word.encode() for word in words]
        parts = b"".join(b"$%d\r\n%s\r\n" % (len(word), word) for word in encoded)
        self._wait_at_most(request)
        self._sock.sendall(b"*%d\r\n%s" % (len(encoded), parts))
        return self._read_answer(request)

    def close(self) -> None:
        """Disconnect."""
        self._sock.close()

    def _read_answer(self, request: Request) -> Any:
        line = self._read(request, None)
        kind, text = line[:1], line[1:].decode(errors="replace")
        if kind == b"-":
            raise ServerError(text)
        if kind == b"+":
            return text
        if kind not in (b":", b"$", b"*"):
            raise ConnectionError(f"what answers speaks another protocol: {line[:40]!r}")
        number = int(text)
        if kind == b":":
            return number
        if number < 0:
            return None
        if kind == b"*":
            return [self._read_answer(request) for _ in range(number)]
        return self._read(request, number).decode(errors="replace")

    def _read(self, request: Request, size: int | None) -> bytes:
        """A line, or so many bytes with the line end behind them; both without it."""
        while True:
            end = self._buffer.find(b"\r\n") if size is None else size
            if 0 <= end <= len(self._buffer) - 2:
                data, self._buffer = self._buffer[:end], self._buffer[end + 2 :]
                return data
            if len(self._buffer) > _ANSWER_LIMIT_BYTES:
                raise ConnectionError("the answer is too long")
            self._wait_at_most(request)
            more = self._sock.recv(1 << 16)
            if not more:
                raise ConnectionError("the server has closed it")
            self._buffer += more

    def _wait_at_most(self, request: Request) -> None:
        left_s = request.left_s()
        if left_s <= 0:
            raise TimeoutError("timed out")
        self._sock.settimeout(left_s)
