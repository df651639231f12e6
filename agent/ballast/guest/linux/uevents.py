"""Uevents of the kernel: lib/kobject_uevent.c (read for Linux 6.1 and 6.12), Documentation/ABI/testing/sysfs-uevent.

The *kernel's* netlink group, not udev's: what we react to (memory blocks, virtio ports) is complete in sysfs and
devtmpfs when the kernel speaks, and udevd can be slow, or killed, just when memory is short.
"""

from __future__ import annotations

import contextlib
import errno
import socket
from collections.abc import Iterator
from dataclasses import dataclass

_NETLINK_KOBJECT_UEVENT = 15  # include/uapi/linux/netlink.h, all architectures
_KERNEL_GROUP, _KERNEL_PORT = 1, 0
_MESSAGE_BYTES = 1 << 13  # UEVENT_BUFFER_SIZE is 2048, and a header of at most a path's length goes before it


@dataclass(frozen=True, slots=True)
class Uevent:
    """What happened ("add", "remove", "change", "online", "offline") to which device of which subsystem."""

    action: str
    subsystem: str
    name: str


def parse_uevent(message: bytes) -> Uevent:
    r"""Parse a message of the kernel's; keys that later kernels add are passed over. ValueError.

    Debian 13's Linux 6.12, without what follows: ``online@/devices/system/memory/memory33\0ACTION=online\0``
    ``DEVPATH=/devices/system/memory/memory33\0SUBSYSTEM=memory\0SYNTH_UUID=0\0SEQNUM=1424\0``
    """
    _header, *fields = message.decode(errors="surrogateescape").split("\0")
    values = dict(field.split("=", 1) for field in fields if "=" in field)
    try:
        return Uevent(values["ACTION"], values["SUBSYSTEM"], values["DEVPATH"].rpartition("/")[2])
    except KeyError as error:
        raise ValueError(f"uevent {message[:80]!r} lacks {error}") from error


class UeventSocket:
    """A netlink socket that hears the uevents of some subsystems; read it when ``fileno`` is readable."""

    def __init__(self, *subsystems: str) -> None:
        self._subsystems = subsystems
        self._socket = socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC, _NETLINK_KOBJECT_UEVENT
        )
        self._socket.bind((0, _KERNEL_GROUP))

    def fileno(self) -> int:
        """Descriptor to wait on."""
        return self._socket.fileno()

    def close(self) -> None:
        """Hear no more."""
        self._socket.close()

    def read(self) -> Iterator[Uevent | None]:
        """Yield what is queued, without waiting; None means that the kernel dropped some: look at sysfs anew."""
        while True:
            try:
                message, (port, _groups) = self._socket.recvfrom(_MESSAGE_BYTES)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                yield None
                continue
            if port != _KERNEL_PORT:  # who has CAP_NET_ADMIN may speak to the group too
                continue
            with contextlib.suppress(ValueError):
                uevent = parse_uevent(message)
                if uevent.subsystem in self._subsystems:
                    yield uevent
