"""Memory of our own process: mmap(2), madvise(2), mprotect(2), mlockall(2), prctl(2).

include/uapi/asm-generic/mman.h and mman-common.h; the values are those of x86 and arm64.
"""

from __future__ import annotations

import ctypes
import os

HUGE_PAGE_BYTES = 2 << 20

MCL_CURRENT, MCL_FUTURE, MCL_ONFAULT = 1, 2, 4
PROT_NONE, PROT_READ, PROT_WRITE = 0, 1, 2
MAP_PRIVATE, MAP_ANONYMOUS, MAP_NORESERVE = 0x02, 0x20, 0x4000
PR_SET_THP_DISABLE = 41  # include/uapi/linux/prctl.h
MADV_DONTFORK, MADV_HUGEPAGE, MADV_DONTDUMP = 10, 14, 16
_MAP_FAILED = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mlockall.argtypes = (ctypes.c_int,)
_libc.prctl.argtypes = (ctypes.c_int, *(ctypes.c_ulong,) * 4)
_libc.mmap.argtypes = (
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
)
_libc.mmap.restype = ctypes.c_void_p
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def lock_all_memory() -> None:
    """Keep every page of this process once it was touched (ONFAULT costs 0.4 MiB where all at once costs 8.7)."""
    _check(_libc.mlockall(MCL_CURRENT | MCL_FUTURE | MCL_ONFAULT), "mlockall")


def lock_present_memory() -> None:
    """The same for what is mapped now, and nothing that is mapped later. OSError."""
    _check(_libc.mlockall(MCL_CURRENT | MCL_ONFAULT), "mlockall")


def avoid_huge_pages() -> None:
    """Have no page of this process, and of what it starts, made a huge one: 0.4 MiB less of a heap with holes.

    To be called before there is a heap to speak of. Where the kernel will not, nothing is lost.
    """
    _libc.prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0)


def map_for_huge_pages(bytes_: int) -> int:
    """Reserve anonymous memory that is aligned to huge pages and asks for them; returns its address.

    ``bytes_`` is a multiple of HUGE_PAGE_BYTES. Nothing is allocated before it is touched, a child does not inherit it
    and a core dump leaves it out, and it counts for nothing in Committed_AS unless ``vm.overcommit_memory`` is 2.
    OSError; a kernel without huge pages is none.
    """
    flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE
    start = _libc.mmap(None, bytes_ + HUGE_PAGE_BYTES, PROT_READ | PROT_WRITE, flags, -1, 0)
    if start == _MAP_FAILED:
        _check(-1, "mmap")
    address = int(start) + -int(start) % HUGE_PAGE_BYTES
    if address > start:
        unmap(start, address - start)
    unmap(address + bytes_, start + HUGE_PAGE_BYTES - address)
    _libc.madvise(address, bytes_, MADV_HUGEPAGE)
    for advice in (MADV_DONTFORK, MADV_DONTDUMP):
        _check(_libc.madvise(address, bytes_, advice), "madvise")
    return address


def forbid_access(address: int, bytes_: int) -> None:
    """Let nothing read or write these pages any more: PROT_NONE. What is pinned stays where it is."""
    _check(_libc.mprotect(address, bytes_, PROT_NONE), "mprotect")


def unmap(address: int, bytes_: int) -> None:
    """Give address space back, and the pages unless something else still pins them. No bytes are no error."""
    if bytes_:
        _check(_libc.munmap(address, bytes_), "munmap")


def _check(result: int, call: str) -> None:
    if result != 0:
        errno = ctypes.get_errno()
        raise OSError(errno, f"{call}: {os.strerror(errno)}")
