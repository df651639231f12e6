"""Transient units: programs that systemd starts for us, outside the agent's sandbox and beyond its death.

Each start is a connection of its own to the system bus, blocking and in a thread: unlike the agent's place on the bus
it passes descriptors. systemd's D-Bus interface is org.freedesktop.systemd1(5). Not while a file system is frozen:
it asks PID 1.
"""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Mapping, Sequence
from typing import Any

from ballast.guest.bus import SYSTEM_BUS_PATH, BusError, Message, MessageType, Variant, decode
from ballast.guest.threads import in_thread

START_S = 10.0

_SYSTEMD = ("org.freedesktop.systemd1", "/org/freedesktop/systemd1", "org.freedesktop.systemd1.Manager")
_FIXED_BYTES = 16
_ANSWER_LIMIT_BYTES = 1 << 20


def command_line(command: Sequence[str]) -> Variant:
    """The value of ``ExecStart`` and its like: one command, whose failure counts."""
    return Variant("a(sasb)", [[command[0], list(command), False]])


async def start_unit(
    name: str,
    properties: Mapping[str, Variant],
    *,
    stdio_fd: int,
    path: str = SYSTEM_BUS_PATH,
    timeout_s: float = START_S,
) -> None:
    """Have systemd start the unit ``name`` with ``stdio_fd`` as its standard input and output; not waited for.

    The descriptor stays the caller's. BusError if systemd refuses, OSError, TimeoutError.
    """
    fd = os.dup(stdio_fd)
    message = _start_message(name, properties, fd)
    await in_thread(lambda: _send(message, fd, path, time.monotonic() + timeout_s), name="start-unit")


def _start_message(name: str, properties: Mapping[str, Variant], fd: int) -> Message:
    values = dict(properties) | {
        "StandardInputFileDescriptor": Variant("h", 0),
        "StandardOutputFileDescriptor": Variant("h", 1),
    }
    body = [name, "fail", [[key, value] for key, value in values.items()], []]
    destination, path, interface = _SYSTEMD
    return Message(
        destination,
        path,
        interface,
        "StartTransientUnit",
        signature="ssa(sv)a(sa(sv))",
        body=body,
        serial=2,
        unix_fds=[fd, fd],
    )


def _send(message: Message, fd: int, path: str, deadline_s: float) -> None:
    """Say hello, call, and hear the answer. Takes ``fd`` over."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as bus:
            bus.settimeout(max(0.01, deadline_s - time.monotonic()))
            bus.connect(path)
            _authenticate(bus)
            driver = "org.freedesktop.DBus"
            hello = Message(driver, "/org/freedesktop/DBus", driver, "Hello", serial=1)
            bus.sendall(bytes(hello._marshall()))
            # Only then: what is read together with the end of the authentication loses its descriptors.
            _hear_answer(bus, hello.serial, deadline_s)
            socket.send_fds(bus, [bytes(message._marshall(negotiate_unix_fd=True))], [fd, fd])
            _hear_answer(bus, message.serial, deadline_s)
    finally:
        os.close(fd)


def _authenticate(bus: socket.socket) -> None:
    bus.sendall(b"\0AUTH EXTERNAL " + str(os.getuid()).encode().hex().encode() + b"\r\nNEGOTIATE_UNIX_FD\r\n")
    said = b""
    while said.count(b"\r\n") < 2:
        part = bus.recv(1024)
        if not part or len(said) > _FIXED_BYTES * 64:
            raise BusError("the bus does not let us in")
        said += part
    if not said.startswith(b"OK ") or b"AGREE_UNIX_FD" not in said:
        raise BusError("the bus does not let us in, or passes no descriptors")
    bus.sendall(b"BEGIN\r\n")


def _hear_answer(bus: socket.socket, serial: int, deadline_s: float) -> None:
    while True:
        bus.settimeout(max(0.01, deadline_s - time.monotonic()))
        message = _receive(bus)
        if message is None or message.reply_serial != serial:
            continue
        if message.message_type is MessageType.ERROR:
            raise BusError(f"{message.error_name}: {message.body[0] if message.body else ''}")
        return


def _receive(bus: socket.socket) -> Any:
    fixed = _read(bus, _FIXED_BYTES)
    body_bytes, fields_bytes = struct.unpack("<4xI4xI" if fixed[:1] == b"l" else ">4xI4xI", fixed)
    rest_bytes = fields_bytes + -fields_bytes % 8 + body_bytes
    if rest_bytes > _ANSWER_LIMIT_BYTES:
        raise BusError("the bus answers more than was asked for")
    return decode(fixed + _read(bus, rest_bytes))


def _read(bus: socket.socket, count_bytes: int) -> bytes:
    data = b""
    while len(data) < count_bytes:
        part = bus.recv(count_bytes - len(data))
        if not part:
            raise ConnectionResetError("the bus is gone")
        data += part
    return data
