"""glibc's heap: malloc_trim(3)."""

from __future__ import annotations

import ctypes

_libc = ctypes.CDLL(None)


def trim() -> None:
    """Give back what was freed, to the kernel. Does not block; may run while frozen."""
    _libc.malloc_trim(0)
