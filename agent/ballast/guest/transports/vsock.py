"""vsock: vsock(7), include/uapi/linux/vm_sockets.h. The listening socket comes from systemd.

Only the host, CID 2, is let in: any user of the guest can load ``vsock_loopback`` and come as CID 1, and user-space
vsock daemons carry other guests' connections. A stranger is closed before a byte of it is read.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator

_HOST_CID = 2  # VMADDR_CID_HOST


async def accept(listener: socket.socket) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """Yield the host's connections; ``writer.get_extra_info("peername")`` is (CID, port)."""
    listener.setblocking(False)
    loop = asyncio.get_running_loop()
    while True:
        try:
            connection, (cid, _port) = await loop.sock_accept(listener)
        except ConnectionAbortedError:
            continue
        if cid != _HOST_CID:
            connection.close()
            continue
        yield await asyncio.open_connection(sock=connection)
