"""What agent and holder say to each other: one JSON object a datagram, over a SOCK_SEQPACKET socket of root's.

Agent: ``take`` (bytes), ``ack`` (chunk), ``release`` (bytes, of: a chunk's id, or "acked" for the newest that was
acknowledged), ``ranges`` (after: a chunk's id), each answered, in order, by ``taken``, ``acked``, ``released``,
``ranges``, or ``failed`` (errno, operation); and ``hurry``, which has no answer of its own: a ``take`` that runs stops
with what it has. Holder: ``hello`` first, with its pid, what it holds, and the chunk that waits for its ack, if any.

A holder outlives its agent, and an upgrade: an agent drives every version up to its own. A chunk is
[id, bytes, ranges, descriptor number of its ring in the holder]. Stdlib only: the holder imports it.
"""

from __future__ import annotations

import json
import socket
from typing import Any

VERSION = 1
SOCKET_PATH = "/run/ballast/balloon.sock"
CHUNK_BYTES = 64 << 20
GRAIN_BYTES = 2 << 20
# What fits into a datagram (net.core.wmem_default is 212,992 bytes) with room to spare. Where memory is so fragmented
# that a chunk would have more, the chunk is smaller.
RANGES_MAX = 4096
_MAX_BYTES = 1 << 18


def send(sock: socket.socket, message: dict[str, Any]) -> None:
    """Send one message; OSError if the other side is gone or does not read."""
    sock.send(json.dumps(message, separators=(",", ":")).encode())


def receive(sock: socket.socket) -> dict[str, Any] | None:
    """One message; None when the other side closed. BlockingIOError, ValueError for nonsense."""
    data = sock.recv(_MAX_BYTES)
    if not data:
        return None
    message = json.loads(data)
    if not isinstance(message, dict):
        raise ValueError("holder message is no object")
    return message
