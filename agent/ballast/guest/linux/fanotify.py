"""fanotify groups as /proc shows them: proc_pid_fdinfo(5), ``fs/notify/fdinfo.c``, include/uapi/linux/fanotify.h.

A group's descriptor has one line for itself and one for each mark, numbers in hexadecimal::

    fanotify flags:4 event-flags:0
    fanotify mnt_id:1d mflags:0 mask:10000 ignored_mask:0
    fanotify sdev:800001 mflags:0 mask:10000 ignored_mask:0
    fanotify ino:2a sdev:800001 mflags:0 mask:10000 ignored_mask:0 fhandle-bytes:8 fhandle-type:1 f_handle:2a...
"""

from __future__ import annotations

import re
from dataclasses import dataclass

# FAN_OPEN_PERM, FAN_ACCESS_PERM, FAN_OPEN_EXEC_PERM, FAN_PRE_ACCESS: the kernel waits for the holder's answer.
PERMISSION_EVENTS = 0x10000 | 0x20000 | 0x40000 | 0x100000

# As grep -H writes it, which looks at every process.
_LINE = re.compile(r"/proc/(\d+)/fdinfo/\d+:fanotify (.*)")


@dataclass(frozen=True, slots=True)
class Mark:
    """What a process is told of before it happens: a mount by its id, or (of) a file system by "major:minor"."""

    pid: int
    mount_id: int | None
    device: str | None


def parse_permission_marks(text: str) -> list[Mark]:
    """The marks whose events wait for an answer, from lines such as ``/proc/812/fdinfo/5:fanotify sdev:...``.

    ValueError for a number that is none; lines and fields of later kernels are passed over.
    """
    marks = []
    for pid, rest in _LINE.findall(text):
        fields = dict(word.partition(":")[::2] for word in rest.split())
        if int(fields.get("mask", "0"), 16) & PERMISSION_EVENTS:
            mount_id, device = fields.get("mnt_id"), fields.get("sdev")
            marks.append(Mark(int(pid), int(mount_id, 16) if mount_id else None, _device(device) if device else None))
    return marks


def _device(number: str) -> str:
    """The kernel's own form of a device number: 12 bits of major, 20 of minor (include/linux/kdev_t.h)."""
    device = int(number, 16)
    return f"{device >> 20}:{device & 0xFFFFF}"
