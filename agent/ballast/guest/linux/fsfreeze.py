"""FIFREEZE, FITHAW and syncfs: include/uapi/linux/fs.h, ``fs/ioctl.c``, ``fs/super.c``, syncfs(2).

Numbers hold for x86, arm64, riscv and s390 (powerpc, mips and sparc shift the direction bits). All three calls sleep
uninterruptibly while they wait for writers: call them in a thread that nothing else waits for.
"""

from __future__ import annotations

import ctypes
import fcntl
import os

FIFREEZE = 0xC0045877  # _IOWR('X', 119, int)
FITHAW = 0xC0045878  # _IOWR('X', 120, int)

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syncfs.argtypes = (ctypes.c_int,)


def freeze(fd: int) -> None:
    """Freeze the file system of ``fd`` and return once no writer is left inside.

    OSError: EOPNOTSUPP if the type cannot be frozen, EBUSY if it is frozen already, EPERM without CAP_SYS_ADMIN,
    EIO where the journal is aborted.
    """
    fcntl.ioctl(fd, FIFREEZE, 0)


def thaw(fd: int) -> None:
    """Thaw the file system of ``fd``; EINVAL if it is not frozen, *or if a freeze of it is still waiting*."""
    fcntl.ioctl(fd, FITHAW, 0)


def sync(fd: int) -> None:
    """Write out all dirty data of the file system of ``fd``."""
    if _libc.syncfs(fd) != 0:
        errno = ctypes.get_errno()
        raise OSError(errno, f"syncfs: {os.strerror(errno)}")
