"""The local socket: for its own user alone."""

from __future__ import annotations

import asyncio
import os
import socket
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ballast.guest.transports import unix


def test_socket_and_folder_are_their_owner_s_alone(tmp_path: Path) -> None:
    path = tmp_path / "run/agent.sock"
    mask = os.umask(0)
    try:
        with unix.listen(path):
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
            assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
        assert os.umask(0) == 0
    finally:
        os.umask(mask)


def test_what_an_earlier_agent_left_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "agent.sock"
    for _ in range(2):
        unix.listen(path).close()
        assert path.is_socket()


async def test_connections_are_yielded_and_one_that_hung_up_early_ends_nothing(tmp_path: Path) -> None:
    path = tmp_path / "agent.sock"
    with unix.listen(path) as listener, socket.socket(socket.AF_UNIX) as early, socket.socket(socket.AF_UNIX) as late:
        early.connect(str(path))
        early.close()
        late.connect(str(path))
        late.send(b"hello")
        connections = unix.accept(listener)
        async with asyncio.timeout(10):
            first, writer = await anext(connections)
            assert await first.read() == b""
            writer.close()
            second, writer = await anext(connections)
            assert await second.readexactly(5) == b"hello"
            writer.close()
        await connections.aclose()  # type: ignore[attr-defined]


@contextmanager
def somebody_else() -> Iterator[None]:
    """Nobody, for as long."""
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become somebody else")
async def test_another_user_is_closed_before_a_byte_is_read() -> None:
    """The mode of the socket keeps others out; should it be wrong, the credentials still do."""
    with (
        tempfile.TemporaryDirectory() as folder,
        unix.listen(path := Path(folder) / "agent.sock") as listener,
        socket.socket(socket.AF_UNIX) as stranger,
    ):
        Path(folder).chmod(0o711)
        with somebody_else(), pytest.raises(PermissionError):
            stranger.connect(str(path))
        path.chmod(0o666)
        with somebody_else():
            stranger.connect(str(path))
        stranger.setblocking(False)
        stranger.send(b"hello")
        accepting = asyncio.ensure_future(anext(unix.accept(listener)))
        async with asyncio.timeout(10):
            with pytest.raises(ConnectionResetError):  # closed with bytes unread
                await asyncio.get_running_loop().sock_recv(stranger, 100)
        accepting.cancel()
        await asyncio.wait([accepting])
