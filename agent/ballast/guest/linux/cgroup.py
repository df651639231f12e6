"""Killing all that is in a control group: Documentation/admin-guide/cgroup-v2.rst.

Not by ``cgroup.kill``. Since Linux 6.14, and 6.12 as Debian 13 has it, a group that was killed so once kills whatever
is cloned into it ever after (the fork's kill_seq is taken from the parent's group, not from the one cloned into), and
that is how systemd starts an ``ExecStopPost=``.
"""

from __future__ import annotations

import contextlib
import os
import signal

_ROUNDS = 16  # for what forks meanwhile
_READ_BYTES = 1 << 16


def kill_all(procs_fd: int) -> None:
    """SIGKILL every process that ``cgroup.procs``, open for reading as ``procs_fd``, lists. Needs CAP_KILL.

    Does not wait until they are dead: one in uninterruptible sleep is not before it wakes. A group that is gone is
    no error.
    """
    for _ in range(_ROUNDS):
        pids = _pids(procs_fd)
        if not pids:
            return
        for pid in pids:
            with contextlib.suppress(OSError):  # it ended by itself
                pidfd = os.pidfd_open(pid)
                try:
                    if pid in _pids(procs_fd):  # still the same process, now that its number cannot be another's
                        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                finally:
                    os.close(pidfd)


def _pids(procs_fd: int) -> set[int]:
    try:
        return {int(pid) for pid in os.pread(procs_fd, _READ_BYTES, 0).split()}
    except OSError:  # ENODEV
        return set()
