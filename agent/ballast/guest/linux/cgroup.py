"""Killing all that is in a control group: Documentation/admin-guide/cgroup-v2.rst.

Not by ``cgroup.kill``. Since Linux 6.14, and 6.12 as Debian 13 has it, a group that was killed so once kills whatever
is cloned into it ever after (the fork's kill_seq is taken from the parent's group, not from the one cloned into), and
that is how systemd starts an ``ExecStopPost=``.

Nor by killing until nobody is left: when the unit's process is dead systemd starts its ``ExecStopPost=``, in the same
group, and that is not meant. So all are stopped first, until there are no new ones, and then killed once.
"""

from __future__ import annotations

import contextlib
import os
import signal

_ROUNDS = 16  # for what forks before it is stopped
_READ_BYTES = 1 << 16


def kill_all(procs_fd: int) -> None:
    """SIGKILL every process that ``cgroup.procs``, open for reading as ``procs_fd``, lists. Needs CAP_KILL.

    Whoever comes into the group when one of these has died is left alone. Does not wait until they are dead: one in
    uninterruptible sleep is not before it wakes. A group that is gone is no error.
    """
    stopped: dict[int, int] = {}  # a descriptor for each, so that a number that another gets later is not killed
    try:
        for _ in range(_ROUNDS):
            new = _pids(procs_fd) - stopped.keys()
            if not new:
                break
            for pid in new:
                with contextlib.suppress(OSError):  # it ended by itself
                    stopped[pid] = _stop(pid, procs_fd)
        for pidfd in stopped.values():
            with contextlib.suppress(OSError):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    finally:
        for pidfd in stopped.values():
            os.close(pidfd)


def _stop(pid: int, procs_fd: int) -> int:
    """Stop a process of the group; its descriptor. With a signal to be handled it forks no more (copy_process)."""
    pidfd = os.pidfd_open(pid)
    try:
        if pid not in _pids(procs_fd):  # the number may have become another's
            raise ProcessLookupError(pid)
        signal.pidfd_send_signal(pidfd, signal.SIGSTOP)
    except OSError:
        os.close(pidfd)
        raise
    return pidfd


def _pids(procs_fd: int) -> set[int]:
    try:
        return {int(pid) for pid in os.pread(procs_fd, _READ_BYTES, 0).split()}
    except OSError:  # ENODEV
        return set()
