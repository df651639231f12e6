"""Uevents of the kernel by pyudev: Documentation/ABI/testing/sysfs-uevent, lib/kobject_uevent.c.

The *kernel's* netlink group, not udev's: what we react to (memory blocks, virtio ports) is complete in sysfs and
devtmpfs when the kernel speaks, and udevd can be slow, or killed, just when memory is short.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from dataclasses import dataclass

import pyudev


@dataclass(frozen=True, slots=True)
class Uevent:
    """What happened ("add", "remove", "change", "online", "offline") to which device of which subsystem."""

    action: str
    subsystem: str
    name: str


class UeventSocket:
    """A netlink socket that hears the uevents of some subsystems; read it when ``fileno`` is readable."""

    def __init__(self, *subsystems: str) -> None:
        self._monitor = pyudev.Monitor.from_netlink(pyudev.Context(), source="kernel")
        for subsystem in subsystems:
            self._monitor.filter_by(subsystem)
        self._monitor.start()

    def fileno(self) -> int:
        """Descriptor to wait on."""
        return int(self._monitor.fileno())

    def read(self) -> Iterator[Uevent | None]:
        """Yield what is queued, without waiting; None means that the kernel dropped some: look at sysfs anew."""
        while True:
            try:
                device = self._monitor.poll(timeout=0)
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                yield None
                continue
            if device is None:
                return
            yield Uevent(str(device.action), str(device.subsystem), str(device.sys_name))
