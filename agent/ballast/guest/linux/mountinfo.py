r"""The table of mounts: proc_pid_mountinfo(5), ``fs/proc_namespace.c``.

A line reads ``36 35 98:0 /root /mnt rw,noatime master:1 - ext3 /dev/root rw,errors=continue``; blanks, newlines and
backslashes in names are written as octal escapes such as ``\040``. Every other byte of a name stands as it is, and
whoever may use fusermount(1) chooses names: they may hold what is no UTF-8 and what Python takes for an end of line.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_ESCAPE = re.compile(r"\\([0-7]{3})")


@dataclass(frozen=True, slots=True)
class Mount:
    """One mount; ``device`` is the superblock's "major:minor", the same for each mount of one file system."""

    mount_id: int
    parent_id: int
    device: str
    root: str
    mountpoint: str
    options: frozenset[str]
    type: str
    source: str
    super_options: frozenset[str]


def parse_mountinfo(text: str) -> list[Mount]:
    """All mounts, oldest first; ValueError names a line that cannot be read."""
    return [_parse_line(line) for line in text.split("\n") if line]


def _parse_line(line: str) -> Mount:
    try:
        before, after = line.split(" - ", 1)
        mount_id, parent_id, device, root, mountpoint, options, *_optional = before.split(" ")
        kind, source, super_options, *_later = after.split(" ")
        return Mount(
            int(mount_id),
            int(parent_id),
            device,
            _unescape(root),
            _unescape(mountpoint),
            frozenset(options.split(",")),
            kind,
            _unescape(source),
            frozenset(super_options.split(",")),
        )
    except ValueError as error:
        raise ValueError(f"cannot read mountinfo line {line!r}") from error


def _unescape(name: str) -> str:
    return _ESCAPE.sub(lambda match: chr(int(match.group(1), 8)), name)
