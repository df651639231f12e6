"""What agent and guard say to each other: one JSON object a datagram, over a SOCK_SEQPACKET socket of root's.

Agent: ``limit``, ``freeze`` (with the file systems' descriptors as SCM_RIGHTS), ``renew``, ``thaw``, ``keep`` (with two
descriptors for each writer) and ``release``. Guard: ``hello``, ``busy``, ``settled`` for each file system as it freezes
or fails, ``frozen`` when none is left to freeze, ``renewed``, ``thawed`` at the end. Leases are absolute, on
CLOCK_BOOTTIME, which both processes read alike and which goes on through a suspend. Stdlib only: the guard imports it.
"""

from __future__ import annotations

import json
import socket
import time
from typing import Any

VERSION = 1
SOCKET_PATH = "/run/ballast/guard.sock"
MAX_FILESYSTEMS = 250  # SCM_MAX_FD is 253
_MAX_BYTES = 1 << 16  # five times what the longest message has; more than 128 KiB would be an mmap for each


def boottime_s() -> float:
    """Seconds since boot, suspends included."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def send(sock: socket.socket, message: dict[str, Any], fds: list[int] | None = None) -> None:
    """Send one message; OSError if the other side is gone or does not read. Never waits on a non-blocking socket."""
    socket.send_fds(sock, [json.dumps(message).encode()], fds or [])


def receive(sock: socket.socket) -> tuple[dict[str, Any] | None, list[int]]:
    """One message and its descriptors; None when the other side closed. BlockingIOError, ValueError for nonsense."""
    data, fds, _flags, _address = socket.recv_fds(sock, _MAX_BYTES, MAX_FILESYSTEMS)
    if not data:
        return None, fds
    message = json.loads(data)
    if not isinstance(message, dict):
        raise ValueError("guard message is no object")
    return message, fds
