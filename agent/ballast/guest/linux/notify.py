"""sd_listen_fds(3), and sd_notify(3) and the notify socket without ever waiting.

systemd-python's ``daemon.notify`` waits when the receiver's queue is full, and PID 1 can itself be stuck behind a
frozen root: then a watchdog message that waits would stop the one process that could thaw it.
"""

from __future__ import annotations

import os
import socket

_LISTEN_FDS_START = 3  # SD_LISTEN_FDS_START of systemd/sd-daemon.h


def listen_fds() -> list[int]:
    """The descriptors that systemd has passed to this process, from 3 on; none if it has passed none, or a second time.

    They are not inherited any further, and neither is the word of them.
    """
    pid, count = os.environ.pop("LISTEN_PID", ""), os.environ.pop("LISTEN_FDS", "")
    os.environ.pop("LISTEN_FDNAMES", None)
    if pid != str(os.getpid()) or not count.isdigit():
        return []
    fds = list(range(_LISTEN_FDS_START, _LISTEN_FDS_START + int(count)))
    for fd in fds:
        os.set_inheritable(fd, False)
    return fds


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
