"""io_uring, for its registered buffers alone: the one way by which a program pins its own pages (FOLL_LONGTERM).

include/uapi/linux/io_uring.h, io_uring_setup(2), io_uring_register(2); Linux 5.13 and later, where buffers can be
registered one by one. Nothing is ever submitted to a ring.
"""

from __future__ import annotations

import ctypes
import os

_SYS_SETUP, _SYS_REGISTER = 425, 427
_REGISTER_BUFFERS, _UNREGISTER_BUFFERS, _REGISTER_BUFFERS_UPDATE = 0, 1, 16
_PARAMS_BYTES = 120

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


class _Iovec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


class _Update(ctypes.Structure):
    """struct io_uring_rsrc_update2"""

    _fields_ = (
        ("offset", ctypes.c_uint32),
        ("reserved", ctypes.c_uint32),
        ("data", ctypes.c_uint64),
        ("tags", ctypes.c_uint64),
        ("count", ctypes.c_uint32),
        ("reserved2", ctypes.c_uint32),
    )


class Ring:
    """A ring with room for pinned buffers. What it pins stays pinned until the last copy of ``fd`` is closed.

    A copy for another process is got by pidfd_getfd(2); SCM_RIGHTS refuses rings.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd

    @classmethod
    def open(cls, slots: int) -> Ring:
        """Make a ring with ``slots`` empty buffers.

        OSError: ENOSYS or EPERM where the kernel or ``kernel.io_uring_disabled`` has no io_uring, ENOMEM.
        """
        params = ctypes.create_string_buffer(_PARAMS_BYTES)
        fd = _libc.syscall(ctypes.c_long(_SYS_SETUP), ctypes.c_uint(1), params)
        if fd < 0:
            _raise("io_uring_setup")
        ring = cls(fd)
        try:
            ring._register(_REGISTER_BUFFERS, (_Iovec * slots)(), slots)
        except OSError:
            ring.close()
            raise
        return ring

    def pin(self, slot: int, address: int, bytes_: int) -> None:
        """Pin a buffer of our own memory, touching what was not touched. Up to 1 GiB.

        Blocks while the kernel finds, zeroes and moves pages. OSError: ENOMEM, or EFAULT for what is not writable.
        """
        self._update(slot, _Iovec(address, bytes_))

    def unpin(self, slot: int) -> None:
        """Let one buffer go; Linux before 6.13 takes up to a second for it."""
        self._update(slot, _Iovec(None, 0))

    def unpin_all(self) -> None:
        """Let all buffers go, now, whoever else holds a copy of the ring. ENXIO if that was done already."""
        self._register(_UNREGISTER_BUFFERS, None, 0)

    def close(self) -> None:
        """Close this copy."""
        os.close(self.fd)

    def _update(self, slot: int, iovec: _Iovec) -> None:
        update = _Update(offset=slot, data=ctypes.addressof(iovec), count=1)
        self._register(_REGISTER_BUFFERS_UPDATE, ctypes.byref(update), ctypes.sizeof(update))

    def _register(self, operation: int, argument: object, count: int) -> None:
        call = (ctypes.c_long(_SYS_REGISTER), ctypes.c_int(self.fd), ctypes.c_uint(operation))
        if _libc.syscall(*call, argument, ctypes.c_uint(count)) < 0:
            _raise("io_uring_register")


def _raise(call: str) -> None:
    errno = ctypes.get_errno()
    raise OSError(errno, f"{call}: {os.strerror(errno)}")
