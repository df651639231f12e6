"""A peer that sends bytes, proper requests or not, and sees every line that comes back."""

from __future__ import annotations

import itertools
import json
import socket
import time
from types import TracebackType
from typing import Any, Self

from ballast.host.connect import Unix, parse_target

TIMEOUT_S = 30.0
_READ_BYTES = 1 << 16
_numbers = itertools.count(time.time_ns() // 1000)


def request(command: str, /, **arguments: Any) -> bytes:
    """A request as a line; `mem_blks=` is the wire's `mem-blks`."""
    wire = {name.replace("_", "-"): value for name, value in arguments.items()}
    return json.dumps({"execute": command, **({"arguments": wire} if wire else {})}).encode() + b"\n"


class Raw:
    """A connection to a connect string of UNIX sockets. EOFError where the other end closes, TimeoutError."""

    def __init__(self, target: str, timeout_s: float = TIMEOUT_S) -> None:
        place = parse_target(target)
        assert isinstance(place, Unix)
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(timeout_s)
        self._pending = bytearray()
        try:
            self._socket.connect(place.path)
            if place.connect_port is not None:
                self.send(f"CONNECT {place.connect_port}\n".encode())
                assert self.read_line().startswith(b"OK ")
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Hang up."""
        self._socket.close()

    def send(self, data: bytes) -> None:
        """Write all of it."""
        self._socket.sendall(data)

    def read_line(self) -> bytes:
        """The next line, without its newline."""
        searched = 0
        while (end := self._pending.find(b"\n", searched)) < 0:
            searched = len(self._pending)
            data = self._socket.recv(_READ_BYTES)
            if not data:
                raise EOFError
            self._pending += data
        line = bytes(self._pending[:end])
        del self._pending[: end + 1]
        return line

    def ask(self, command: str, /, **arguments: Any) -> dict[str, Any]:
        """One request and its one answer."""
        self.send(request(command, **arguments))
        answer: dict[str, Any] = json.loads(self.read_line())
        return answer

    def exchange(self, data: bytes) -> list[bytes]:
        """Send anything and return all lines that it brings about; then the stream is in step again.

        The last of them answers the 0xFF of the guest-sync-delimited that finds the end.
        """
        number = next(_numbers)
        self.send(data + b"\xff" + request("guest-sync-delimited", id=number))
        lines = []
        while (line := self.read_line()) != b'\xff{"return": %d}' % number:
            lines.append(line)
        return lines
