"""The host's own kernel calls: holes in memory that is a file, what a process has mapped, exchanged folders.

fallocate(2), mincore(2), renameat2(2), proc(5), unix(7), include/uapi/linux/falloc.h, fs.h and magic.h. No policy;
OSError.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import re
import socket
import struct
from dataclasses import dataclass
from pathlib import Path

TMPFS_MAGIC = 0x01021994
HUGETLBFS_MAGIC = 0x958458F6
_KEEP_SIZE, _PUNCH_HOLE = 0x01, 0x02
_AT_FDCWD, _RENAME_EXCHANGE = -100, 1 << 1
_MAP_FAILED = ctypes.c_void_p(-1).value

_MAPPING = re.compile(
    r"(?P<start>[0-9a-f]+)-(?P<end>[0-9a-f]+) (?P<modes>[rwxps-]{4}) (?P<offset>[0-9a-f]+) "
    r"(?P<major>[0-9a-f]+):(?P<minor>[0-9a-f]+) (?P<inode>\d+)(?: +(?P<path>.*))?"
)

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long)
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
_libc.mmap.restype = ctypes.c_void_p
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p)
_libc.fstatfs.argtypes = (ctypes.c_int, ctypes.c_char_p)
_libc.renameat2.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)


def is_zero(fd: int, offset: int, bytes_: int) -> bool:
    """Whether all of a range reads as zero. A hole does, and reading it allocates nothing."""
    # Shorter where the file ends, which is then no zero.
    return os.pread(fd, bytes_, offset) == bytes(bytes_)


def punch_hole(fd: int, offset: int, bytes_: int) -> None:
    """Free the memory of a range; it reads as zero from then on. What is mapped of it is unmapped by the kernel."""
    if _libc.fallocate(fd, _PUNCH_HOLE | _KEEP_SIZE, offset, bytes_) != 0:
        raise OSError(ctypes.get_errno(), f"fallocate: {os.strerror(ctypes.get_errno())}")


def reserve(fd: int, bytes_: int) -> None:
    """Take the room for the first bytes of a file, also beyond its end, which stays where it is. Blocks."""
    if _libc.fallocate(fd, _KEEP_SIZE, 0, bytes_) != 0:
        raise OSError(ctypes.get_errno(), f"fallocate: {os.strerror(ctypes.get_errno())}")


def allocated_bytes(fd: int, offset: int, bytes_: int) -> int:
    """How much of a range is in memory: neither a hole nor swapped out. Whole pages.

    SEEK_HOLE would walk on over all data behind the range, 10 ms for each GiB of it.
    """
    page_bytes = mmap.PAGESIZE
    resident = ctypes.create_string_buffer(bytes_ // page_bytes)
    address = _libc.mmap(None, bytes_, mmap.PROT_READ, mmap.MAP_SHARED, fd, offset)
    if address == _MAP_FAILED:
        raise OSError(ctypes.get_errno(), f"mmap: {os.strerror(ctypes.get_errno())}")
    try:
        if _libc.mincore(address, bytes_, resident) != 0:
            raise OSError(ctypes.get_errno(), f"mincore: {os.strerror(ctypes.get_errno())}")
    finally:
        _libc.munmap(address, bytes_)
    return page_bytes * (len(resident) - resident.raw.count(0))


def filesystem_magic(fd: int) -> int:
    """``f_type`` of statfs(2), a long."""
    buffer = ctypes.create_string_buffer(512)
    if _libc.fstatfs(fd, buffer) != 0:
        raise OSError(ctypes.get_errno(), f"fstatfs: {os.strerror(ctypes.get_errno())}")
    (magic,) = struct.unpack_from("l", buffer)
    return int(magic)


def exchange(one: Path, other: Path) -> None:
    """Give each of two files or folders the other's name, at once. EINVAL: this file system cannot (NFS, SMB)."""
    if _libc.renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"renameat2: {os.strerror(number)}", str(one), None, str(other))


def peer_pid(sock: socket.socket) -> int:
    """Who listens at the other end of a UNIX socket; 0 if it is in no PID namespace of ours."""
    credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid, _uid, _gid = struct.unpack("3i", credentials)
    return int(pid)


@dataclass(frozen=True, slots=True)
class Mapping:
    """One line of /proc/PID/maps; addresses are the process's own."""

    start: int
    end: int
    is_shared: bool
    offset: int
    device: int
    inode: int
    path: str


def parse_maps(text: str) -> list[Mapping]:
    """Mappings by rising address; ValueError.

    ``7fed4fffe000-7fed5fffe000 rw-s 00000000 00:01 1277       /memfd:memory-backend-memfd (deleted)``
    """
    mappings = []
    for line in text.splitlines():
        if not (match := _MAPPING.fullmatch(line)):
            raise ValueError(f"no line of maps: {line!r}")
        mappings.append(
            Mapping(
                int(match["start"], 16),
                int(match["end"], 16),
                match["modes"][3] == "s",
                int(match["offset"], 16),
                os.makedev(int(match["major"], 16), int(match["minor"], 16)),
                int(match["inode"]),
                match["path"] or "",
            )
        )
    return mappings


def read_maps(pid: int) -> list[Mapping]:
    """What a process has mapped."""
    return parse_maps(Path(f"/proc/{pid}/maps").read_text(errors="replace"))


def open_mapped(pid: int, mapping: Mapping) -> int:
    """Open the very file that is mapped, also one without a name; a new descriptor, for reading and writing.

    By map_files, which needs CAP_SYS_ADMIN or CAP_CHECKPOINT_RESTORE, or else by the process's own descriptors.
    """
    folder = Path(f"/proc/{pid}")
    link = folder / f"map_files/{mapping.start:x}-{mapping.end:x}"
    for path in (link, *(folder / "fd").iterdir()):
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK) if _is_file(path, mapping) else None
        except OSError:
            continue
        if fd is not None:
            return fd
    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), f"{mapping.path} of process {pid}")


def _is_file(path: Path, mapping: Mapping) -> bool:
    about = path.stat()
    return (about.st_dev, about.st_ino) == (mapping.device, mapping.inode)


def pinned_bytes(pid: int) -> int:
    """What a process has locked (mlock, VFIO) or pinned (RDMA, vDPA): the larger of VmLck and VmPin."""
    text = Path(f"/proc/{pid}/status").read_text()
    return max(1024 * int(kib) for kib in re.findall(r"^Vm(?:Lck|Pin):\s+(\d+) kB$", text, re.MULTILINE))


def process_name(pid: int) -> str:
    """``comm`` of a process, of which the kernel keeps 15 characters."""
    return Path(f"/proc/{pid}/comm").read_text().rstrip("\n")
