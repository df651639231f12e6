"""One message a datagram, descriptors with it."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from typing import NoReturn

import pytest

from ballast.guest.quiesce.guard_protocol import MAX_FILESYSTEMS, receive, send

Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with one, other:
        one.setblocking(False)
        other.setblocking(False)
        yield one, other


@pytest.mark.parametrize("data", [b"garbage", b"5", b"[]", b"null", b"\xff", b"{"])
def test_nonsense_is_a_value_error(pair: Pair, data: bytes) -> None:
    pair[0].send(data)
    with pytest.raises(ValueError):  # noqa: PT011 - some texts are json's
        receive(pair[1])


def test_messages_stay_apart_and_in_order(pair: Pair) -> None:
    for number in range(3):
        send(pair[0], {"op": "x", "number": number})
    assert [receive(pair[1]) for _ in range(3)] == [({"op": "x", "number": number}, []) for number in range(3)]
    with pytest.raises(BlockingIOError):
        receive(pair[1])


def test_a_closed_socket_is_none(pair: Pair) -> None:
    pair[0].close()
    assert receive(pair[1]) == (None, [])
    with pytest.raises(OSError, match="Broken pipe"):
        send(pair[1], {})


def test_as_many_descriptors_as_there_may_be_file_systems(pair: Pair) -> None:
    read, write = os.pipe()
    send(pair[0], {"op": "freeze", "levels": [list(range(MAX_FILESYSTEMS))]}, [write] * MAX_FILESYSTEMS)
    message, fds = receive(pair[1])
    assert message is not None
    assert len(message["levels"][0]) == len(fds) == MAX_FILESYSTEMS
    os.write(fds[-1], b"x")
    assert os.read(read, 1) == b"x"
    for fd in (read, write, *fds):
        os.close(fd)


def send_for_ever(sock: socket.socket) -> NoReturn:
    """As a guard whose agent is stopped."""
    while True:
        send(sock, {"event": "settled", "text": "x" * 1000})


def test_a_sender_whose_reader_sleeps_does_not_wait(pair: Pair) -> None:
    with pytest.raises(BlockingIOError):
        send_for_ever(pair[0])
