"""Descriptors of other processes: pidfd_getfd(2), and prctl(2)'s PR_SET_PTRACER, by which they allow it."""

from __future__ import annotations

import ctypes
import os

_SYS_PIDFD_GETFD = 438
_PR_SET_PTRACER = 0x59616D61

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def copy_descriptor(pid: int, fd: int) -> int:
    """A copy of our own (close-on-exec) of another process's descriptor.

    OSError: ESRCH if there is no such process, EBADF if it has no such descriptor, EPERM if we may not trace it.
    """
    pidfd = os.pidfd_open(pid)
    try:
        copy = _libc.syscall(ctypes.c_long(_SYS_PIDFD_GETFD), ctypes.c_int(pidfd), ctypes.c_int(fd), ctypes.c_uint(0))
        if copy < 0:
            errno = ctypes.get_errno()
            raise OSError(errno, f"pidfd_getfd: {os.strerror(errno)}")
        return int(copy)
    finally:
        os.close(pidfd)


def allow_tracer(pid: int) -> None:
    """Let that process trace us, which copying our descriptors needs where the Yama module restricts it."""
    _libc.prctl(ctypes.c_int(_PR_SET_PTRACER), ctypes.c_ulong(pid), 0, 0, 0)
