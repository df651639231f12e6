"""Connect strings, and the way through a user-space vsock daemon."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from ballast.host.agent import Agent
from ballast.host.connect import NoAnswer, PeerGone, Place, Unix, Vsock, parse_target
from tests.unit.host.fake import FakeAgent, serve


@pytest.mark.parametrize(
    "text",
    [
        "",
        "web1",
        "vsock",
        "vsock:",
        "vsock:x",
        "vsock:-1",
        "vsock:42:",
        "vsock:42:640:1",
        "vsock:4294967295",
        "vsock:42:4294967295",
        "unix:",
        "unix:/a?connect=",
        "unix:/a?connect=x",
        "unix:/a?other=1",
        "tcp:host:1",
    ],
)
def test_a_bad_connect_string_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"expected|32-bit"):
        parse_target(text)


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("vsock:42", Vsock(42, 640)),
        ("vsock:42:1024", Vsock(42, 1024)),
        ("unix:/run/a b/s", Unix("/run/a b/s")),
        ("unix:relative", Unix("relative")),
        ("unix:/run/v?connect=640", Unix("/run/v", 640)),
    ],
)
def test_connect_strings(text: str, place: Place) -> None:
    assert parse_target(text) == place


async def test_a_socket_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(PeerGone, match=r"unix:.*: No such file or directory"):
        async with Agent.connect(f"unix:{tmp_path}/absent"):
            pass


async def test_a_socket_that_nobody_serves_is_told(tmp_path: Path) -> None:
    async with serve(tmp_path / "s"):
        pass
    with pytest.raises(PeerGone, match=r"Connection refused|No such file"):
        async with Agent.connect(f"unix:{tmp_path}/s"):
            pass


@contextlib.asynccontextmanager
async def vsock_daemon(path: Path, answer: bytes, guest: FakeAgent | None = None) -> AsyncIterator[list[bytes]]:
    """What vhost-device-vsock is to a host's program: answers CONNECT, then it is the guest or closes."""
    asked: list[bytes] = []
    done = asyncio.Event()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append(await reader.readline())
        writer.write(answer)
        if guest:
            await guest.serve(reader, writer)
        elif not answer:
            await done.wait()
        writer.transport.abort()

    async with await asyncio.start_unix_server(connected, path):
        yield asked
        done.set()


async def test_connect_asks_the_daemon_for_the_port_and_is_then_on_it(tmp_path: Path) -> None:
    path = tmp_path / "v"
    async with vsock_daemon(path, b"OK 1073741824\n", FakeAgent(path)) as asked:
        async with Agent.connect(f"unix:{path}?connect=640") as agent:
            await agent.guest_ping()
        assert asked == [b"CONNECT 640\n"]


@pytest.mark.parametrize("answer", [b"NO\n", b"OK\n", b"O", b"x" * 100, b"\n", b"OK x\n"])
async def test_a_daemon_that_refuses_is_peer_gone(tmp_path: Path, answer: bytes) -> None:
    path = tmp_path / "v"
    async with vsock_daemon(path, answer):
        with pytest.raises(PeerGone, match="vsock daemon"):
            async with Agent.connect(f"unix:{path}?connect=640"):
                pass


async def test_a_daemon_that_closes_without_an_answer_is_peer_gone(tmp_path: Path) -> None:
    path = tmp_path / "v"

    async def close(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.transport.abort()

    async with await asyncio.start_unix_server(close, path):
        with pytest.raises(PeerGone, match=r"640|reset|Broken"):
            async with Agent.connect(f"unix:{path}?connect=640"):
                pass


async def test_a_daemon_that_says_nothing_is_no_answer(tmp_path: Path) -> None:
    path = tmp_path / "v"
    async with vsock_daemon(path, b""):
        with pytest.raises(NoAnswer, match="no connection within"):
            async with Agent.connect(f"unix:{path}?connect=640", timeout_s=0.05):
                pass
