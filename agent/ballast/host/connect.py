"""Connect strings -> byte streams, and nothing of what is said on them.

``vsock:CID[:PORT]``            AF_VSOCK (include/uapi/linux/vm_sockets.h)
``unix:PATH``                   the agent's local socket, or QEMU's chardev socket of a virtio-serial port
``unix:PATH?connect=PORT``      a user-space vsock daemon (vhost-device-vsock, Firecracker, Cloud Hypervisor): we write
                                ``CONNECT 640\\n`` and read ``OK 1073741824\\n``, then are on the guest's port
"""

from __future__ import annotations

import asyncio
import re
import socket
from dataclasses import dataclass

from ballast.wire.errors import AgentError
from ballast.wire.names import VSOCK_PORT

_VSOCK = re.compile(r"vsock:(?P<cid>\d{1,10})(?::(?P<port>\d{1,10}))?")
_UNIX = re.compile(r"unix:(?P<path>[^?]+)(?:\?connect=(?P<port>\d{1,10}))?")
# VMADDR_CID_ANY and VMADDR_PORT_ANY are no addresses to connect to.
_VSOCK_MOST = 2**32 - 2
_HANDSHAKE_LIMIT_BYTES = 64


class PeerGone(AgentError):
    """There is no agent at the other end, or no longer: it cannot be reached, or the connection was lost."""


class NoAnswer(PeerGone):
    """The agent did not answer in the time that the call allowed; what was asked for may yet happen."""


@dataclass(frozen=True, slots=True)
class Vsock:
    """A guest's vsock port."""

    cid: int
    port: int = VSOCK_PORT


@dataclass(frozen=True, slots=True)
class Unix:
    """A UNIX socket; ``connect_port`` is the guest's port where a user-space vsock daemon listens on it."""

    path: str
    connect_port: int | None = None


Place = Vsock | Unix
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


def parse_target(text: str) -> Place:
    """Read a connect string; ValueError says what is wrong with it."""
    if match := _VSOCK.fullmatch(text):
        cid, port = int(match["cid"]), int(match["port"] or VSOCK_PORT)
        if cid > _VSOCK_MOST or port > _VSOCK_MOST:
            raise ValueError(f"{text}: CID and port are 32-bit numbers")
        return Vsock(cid, port)
    if match := _UNIX.fullmatch(text):
        return Unix(match["path"], int(match["port"]) if match["port"] else None)
    raise ValueError(f"{text}: expected vsock:CID[:PORT], unix:PATH or unix:PATH?connect=PORT")


async def open_streams(place: Place) -> Streams:
    """Connect to ``place``, without a deadline of its own; OSError, PeerGone."""
    if isinstance(place, Vsock):
        return await _open_vsock(place)
    reader, writer = await asyncio.open_unix_connection(place.path)
    if place.connect_port is not None:
        try:
            await _shake_hands(reader, writer, place.connect_port)
        except BaseException:
            writer.transport.abort()
            raise
    return reader, writer


async def _open_vsock(place: Vsock) -> Streams:
    connection = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
    try:
        connection.setblocking(False)
        await asyncio.get_running_loop().sock_connect(connection, (place.cid, place.port))
        return await asyncio.open_connection(sock=connection)
    except BaseException:
        connection.close()
        raise


async def _shake_hands(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, port: int) -> None:
    writer.write(f"CONNECT {port}\n".encode())
    await writer.drain()
    answer = bytearray()
    # Byte by byte, since what follows the newline is already the agent's.
    while not answer.endswith(b"\n") and len(answer) < _HANDSHAKE_LIMIT_BYTES:
        byte = await reader.read(1)
        if not byte:
            # The daemons close the connection when the guest refuses or is not there; none of them says why.
            raise PeerGone(f"the vsock daemon closed the connection: nothing listens on the guest's port {port}")
        answer += byte
    if not re.fullmatch(rb"OK \d+\n", answer):
        raise PeerGone(f"the vsock daemon answered {bytes(answer)!r} to CONNECT {port}")
