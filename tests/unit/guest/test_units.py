"""Starting a unit: what systemd would be sent, descriptors included, and every way in which a bus can fail us."""

from __future__ import annotations

import os
import socket
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ballast.guest.bus import BusError, Message, MessageType, Variant, decode
from ballast.guest.units import command_line, start_unit

OK = b"OK 0123456789abcdef0123456789abcdef\r\nAGREE_UNIX_FD\r\n"


class OneCall:
    """A bus that lets one client in, and answers its second message as ``answer`` says."""

    def __init__(self, path: Path, answer: Callable[[Message], Message | None], greeting: bytes = OK) -> None:
        self.path = path
        self.call: Any = None
        self.fds: list[int] = []
        self._answer, self._greeting = answer, greeting
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._listener.settimeout(10)
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def join(self) -> None:
        self._thread.join(10)
        self._listener.close()

    def _serve(self) -> None:
        client, _ = self._listener.accept()
        with client:
            client.settimeout(10)
            data = b""
            while not data.endswith(b"NEGOTIATE_UNIX_FD\r\n"):
                data += client.recv(1024)
            client.sendall(self._greeting)
            data = b""
            messages: list[Any] = []
            while len(messages) < 2:
                part, fds, _, _ = socket.recv_fds(client, 1 << 16, 8)
                if not part:
                    return
                self.fds += fds
                data += part
                data = data.removeprefix(b"BEGIN\r\n")
                while (length := _length(data)) and len(data) >= length:
                    messages.append(decode(data[:length]))
                    data = data[length:]
                    if len(messages) == 1:
                        assert not self.fds
                        client.sendall(_frame(Message.new_method_return(messages[0], "s", [":1.7"])))
                        client.sendall(_frame(Message.new_signal("/a", "b.c", "NameAcquired", "s", [":1.7"])))
            self.call = messages[1]
            answer = self._answer(self.call)
            if answer is not None:
                client.sendall(_frame(answer))
            else:
                client.recv(1)


def _length(data: bytes) -> int:
    if len(data) < 16:
        return 0
    body, fields = struct.unpack("<4xI4xI", data[:16])
    return int(16 + fields + -fields % 8 + body)


def _frame(message: Message) -> bytes:
    message.serial = message.serial or 9
    return bytes(message._marshall())


async def test_a_unit_gets_its_properties_and_the_socket_as_both_streams(tmp_path: Path) -> None:
    bus = OneCall(tmp_path / "bus", lambda call: Message.new_method_return(call, "o", ["/job/1"]))
    ours, theirs = socket.socketpair()
    with ours, theirs:
        properties = {"User": Variant("s", "nobody"), "ExecStart": command_line(["/bin/x", "-y"])}
        await start_unit("a.service", properties, stdio_fd=theirs.fileno(), path=str(bus.path))
        bus.join()
        assert (bus.call.interface, bus.call.member) == ("org.freedesktop.systemd1.Manager", "StartTransientUnit")
        name, mode, values, extra = bus.call.body
        assert (name, mode, extra) == ("a.service", "fail", [])
        assert {key: value.value for key, value in values} == {
            "User": "nobody",
            "ExecStart": [["/bin/x", ["/bin/x", "-y"], False]],
            "StandardInputFileDescriptor": 0,
            "StandardOutputFileDescriptor": 1,
        }
        assert len(bus.fds) == 2
        for number, fd in enumerate(bus.fds):
            os.write(fd, b"%d" % number)
            assert ours.recv(1) == b"%d" % number
            os.close(fd)
    assert bus.call.message_type is MessageType.METHOD_CALL


async def test_what_systemd_refuses_is_told(tmp_path: Path) -> None:
    bus = OneCall(tmp_path / "bus", lambda call: Message.new_error(call, "org.x.UnitExists", "already loaded"))
    with socket.socket(socket.AF_UNIX) as stdio, pytest.raises(BusError, match=r"org\.x\.UnitExists: already loaded"):
        await start_unit("a.service", {}, stdio_fd=stdio.fileno(), path=str(bus.path))
    bus.join()
    for fd in bus.fds:
        os.close(fd)


@pytest.mark.parametrize("greeting", [b"REJECTED EXTERNAL\r\nERROR\r\n", b"OK 01\r\nERROR no\r\n", b""])
async def test_a_bus_that_does_not_let_us_in_is_an_error(tmp_path: Path, greeting: bytes) -> None:
    bus = OneCall(tmp_path / "bus", lambda _: None, greeting)
    with socket.socket(socket.AF_UNIX) as stdio, pytest.raises((BusError, TimeoutError)):
        await start_unit("a.service", {}, stdio_fd=stdio.fileno(), path=str(bus.path), timeout_s=0.5)
    bus.join()


async def test_a_systemd_that_does_not_answer_is_given_up(tmp_path: Path) -> None:
    bus = OneCall(tmp_path / "bus", lambda _: None)
    with socket.socket(socket.AF_UNIX) as stdio, pytest.raises(TimeoutError):
        await start_unit("a.service", {}, stdio_fd=stdio.fileno(), path=str(bus.path), timeout_s=0.5)
    bus.join()
    for fd in bus.fds:
        os.close(fd)


async def test_without_a_bus_nothing_is_started(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as stdio, pytest.raises(FileNotFoundError):
        await start_unit("a.service", {}, stdio_fd=stdio.fileno(), path=str(tmp_path / "none"))
