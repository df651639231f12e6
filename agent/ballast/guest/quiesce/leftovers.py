"""The last net: thaw exactly what the record says was being frozen.

systemd runs it when the guard is gone (``ExecStopPost=``), and the agent when it starts and finds a session that
nobody ended. While a FIFREEZE still waits for a writer, FITHAW answers EINVAL, SIGKILL does nothing, and the file
system becomes frozen *after* its freezer died: so each file system is tried until it thaws, or until the freezer is
gone and FITHAW still says EINVAL.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from ballast.guest.linux import fsfreeze, notify, rcu
from ballast.guest.linux.mountinfo import parse_mountinfo
from ballast.guest.linux.tree import Tree
from ballast.guest.linux.writeback import DirtyLimit
from ballast.guest.quiesce.record import PATH, Open, process_start, read_record

RETRY_S = 0.1
STOP_POST_S = 600.0  # as long as a lease can be
_EXTEND_US = 3_000_000


@dataclass(frozen=True, slots=True)
class Leftover:
    """A file system that the record lists: its mount point, and whether it was found frozen and thawed."""

    mountpoint: str
    thawed: bool


def open_filesystem(mountpoints: list[str], device: str) -> int:
    """Open the file system ``device`` by one of its mount points; the descriptor is the caller's.

    A mount point that another mount covers, or that our own mount namespace hides, leads elsewhere: the mount id that
    the kernel reports for the descriptor is looked up, so that nothing but ``device`` is ever returned. OSError with
    ENODEV if none leads there. May block for as long as the path does: call it in a thread.
    """
    trouble = OSError(errno.ENODEV, "hidden behind another mount", mountpoints[0])
    for point in mountpoints:
        try:
            fd = os.open(point, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            trouble = error
            continue
        if _device_of(fd) == device:
            return fd
        os.close(fd)
    raise trouble


def _device_of(fd: int) -> str:
    fields = dict(
        line.split(":\t", 1) for line in Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines() if ":\t" in line
    )
    table = parse_mountinfo(Path("/proc/self/mountinfo").read_text(errors="surrogateescape"))
    mounts = {mount.mount_id: mount.device for mount in table}
    return mounts.get(int(fields["mnt_id"]), "")


def is_running(session: Open) -> bool:
    """Whether the guard that froze, or a thread of it, is still there."""
    try:
        return process_start(session.guard_pid) == session.guard_start
    except OSError:  # ProcessLookupError
        return False


def thaw_leftovers(session: Open, *, deadline_s: float) -> list[Leftover]:
    """Thaw what is left of ``session``, children last as a thaw must be. Blocks until ``deadline_s`` (monotonic)."""
    found = []
    for filesystem in reversed(session.filesystems):
        try:
            fd = open_filesystem(filesystem["mountpoints"], filesystem["device"])
        except OSError:  # unmounted since
            continue
        try:
            found.append(Leftover(filesystem["mountpoints"][0], _thaw(fd, session, deadline_s)))
        finally:
            os.close(fd)
    return found


def _thaw(fd: int, session: Open, deadline_s: float) -> bool:
    while True:
        gone = not is_running(session)
        with contextlib.suppress(OSError):
            fsfreeze.thaw(fd)
            return True
        if gone or time.monotonic() >= deadline_s:
            return False
        notify.notify(f"EXTEND_TIMEOUT_USEC={_EXTEND_US}")  # as ExecStopPost= it has only TimeoutStopSec= otherwise
        time.sleep(RETRY_S)


def restore_settings() -> None:
    """Put back what a guard that was killed had changed for a moment of the whole system; may be called by anybody."""
    rcu.restore()
    DirtyLimit(Tree()).restore()


def main() -> int:
    """``ExecStopPost=`` of the guard; always 0, since there is nobody to act on anything else."""
    restore_settings()
    with contextlib.suppress(OSError, ValueError):
        session = read_record(PATH).open
        if session is not None:
            for leftover in thaw_leftovers(session, deadline_s=time.monotonic() + STOP_POST_S):
                if leftover.thawed:
                    sys.stderr.write(f"ballast: thawed {leftover.mountpoint}, which the guard left frozen\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
