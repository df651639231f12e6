"""A program that has to permit whatever is opened on a path: ``python3 scanner.py PATH WHAT``, until it is killed.

fanotify_init(2), fanotify_mark(2), include/uapi/linux/fanotify.h. WHAT is ``inode``, ``mount`` or ``filesystem``. It
says so on standard output when the mark is there, and lets everybody open: only its descriptor is of interest.
"""

import ctypes
import os
import struct
import sys

FAN_CLASS_CONTENT = 0x4
FAN_MARK_ADD = 0x1
FAN_MARK = {"inode": 0x0, "mount": 0x10, "filesystem": 0x100}
FAN_OPEN_PERM = 0x10000
FAN_ALLOW = 1
AT_FDCWD = -100
EVENT = struct.Struct("=IBBHQii")  # struct fanotify_event_metadata


def main(path: str, what: str) -> None:
    """Mark, tell, and permit everything."""
    libc = ctypes.CDLL(None, use_errno=True)
    group = libc.fanotify_init(FAN_CLASS_CONTENT, os.O_RDONLY)
    flags = FAN_MARK_ADD | FAN_MARK[what]
    mask = ctypes.c_uint64(FAN_OPEN_PERM)
    if group < 0 or libc.fanotify_mark(group, flags, mask, AT_FDCWD, path.encode()) < 0:
        raise OSError(ctypes.get_errno(), "fanotify", path)
    os.write(sys.stdout.fileno(), b"marked\n")
    while True:
        events = os.read(group, 65536)
        for at in range(0, len(events), EVENT.size):
            fd = EVENT.unpack_from(events, at)[5]
            os.write(group, struct.pack("=iI", fd, FAN_ALLOW))
            os.close(fd)


if __name__ == "__main__":
    main(*sys.argv[1:])
