"""The journal's native protocol: https://systemd.io/JOURNAL_NATIVE_PROTOCOL/ (read for systemd 252 and 257).

One datagram a line, from a thread that may wait for journald. systemd-python says the same, with a MiB of libraries.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping

SOCKET_PATH = "/run/systemd/journal/socket"
VALUE_BYTES = 1 << 14  # a datagram takes 200 KiB, and strangers have a say in some values


def encode(fields: Mapping[str, object]) -> bytes:
    """One entry; names are capital letters, digits and underscores. A value is cut at ``VALUE_BYTES``."""
    encoded = bytearray()
    for name, value in fields.items():
        data = str(value).encode(errors="backslashreplace")[:VALUE_BYTES].decode(errors="ignore").encode()
        if b"\n" in data:
            encoded += name.encode() + b"\n" + len(data).to_bytes(8, "little") + data + b"\n"
        else:
            encoded += name.encode() + b"=" + data + b"\n"
    return bytes(encoded)


def send(fields: Mapping[str, object], path: str = SOCKET_PATH) -> None:
    """Write one entry. Waits for as long as journald does not read. OSError."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        sock.sendto(encode(fields), path)
