"""The local UNIX socket: unix(7). For root alone, by the mode of the socket and by the peer's credentials."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
from collections.abc import AsyncIterator
from pathlib import Path

_UCRED = struct.Struct("3i")  # struct ucred: pid, uid, gid


def listen(path: Path) -> socket.socket:
    """Bind ``path``, mode 0600; what an earlier agent left there is replaced."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    mask = os.umask(0o177)
    try:
        listener.bind(str(path))
    finally:
        os.umask(mask)
    listener.listen(16)
    return listener


async def accept(listener: socket.socket) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """Yield connections of our own user, root in production; others are closed before a byte is read.

    The socket is removed at the end.
    """
    loop = asyncio.get_running_loop()
    try:
        while True:
            try:
                connection, _address = await loop.sock_accept(listener)
            except ConnectionAbortedError:
                continue
            credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
            if _UCRED.unpack(credentials)[1] != os.geteuid():
                connection.close()
                continue
            yield await asyncio.open_connection(sock=connection)
    finally:
        _remove(listener)


def _remove(listener: socket.socket) -> None:
    with contextlib.suppress(FileNotFoundError):
        Path(listener.getsockname()).unlink()
    listener.close()
