"""Hearing that folders come and go: inotify(7), include/uapi/linux/inotify.h.

cgroupfs tells of folders that programs make and remove there (vfs_mkdir and vfs_rmdir in fs/namei.c), and not of the
files that the kernel puts into them.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

IN_CREATE, IN_DELETE, IN_ONLYDIR = 0x0000_0100, 0x0000_0200, 0x0100_0000
_READ_BYTES = 1 << 16

_libc = ctypes.CDLL(None, use_errno=True)
_libc.inotify_add_watch.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_uint32)


class Folders:
    """Folders that are watched; ``fileno`` is readable when something in one was made or removed."""

    def __init__(self) -> None:
        """OSError where this user has too many of them (EMFILE)."""
        self._fd = _checked(_libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC))

    def fileno(self) -> int:
        """Descriptor to wait on."""
        return self._fd

    def watch(self, folder: Path) -> None:
        """Watch it until it is gone; once more changes nothing. OSError."""
        _checked(_libc.inotify_add_watch(self._fd, os.fsencode(folder), IN_CREATE | IN_DELETE | IN_ONLYDIR))

    def drain(self) -> None:
        """Take note of all that was told so far. Never blocks."""
        try:
            while os.read(self._fd, _READ_BYTES):
                pass
        except BlockingIOError:
            return

    def close(self) -> None:
        """Watch nothing any more."""
        os.close(self._fd)


def _checked(result: int) -> int:
    if result < 0:
        errno = ctypes.get_errno()
        raise OSError(errno, f"inotify: {os.strerror(errno)}")
    return result
