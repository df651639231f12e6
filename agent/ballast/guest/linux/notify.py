"""sd_notify(3) and the notify socket, without ever waiting.

systemd-python's ``daemon.notify`` waits when the receiver's queue is full, and PID 1 can itself be stuck behind a
frozen root: then a watchdog message that waits would stop the one process that could thaw it.
"""

from __future__ import annotations

import os
import socket


def notify(state: str) -> bool:
    """Send ``READY=1``, ``WATCHDOG=1``...; False if there is no service manager or it does not read. Never blocks."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return False
    if address.startswith("@"):
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK) as sock:
        try:
            sock.sendto(state.encode(), address)
        except OSError:
            return False
    return True


def watchdog_s() -> float | None:
    """How often systemd expects ``WATCHDOG=1``, in seconds; None without a watchdog."""
    if os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    microseconds = os.environ.get("WATCHDOG_USEC", "")
    return int(microseconds) / 1_000_000 if microseconds.isdigit() else None
