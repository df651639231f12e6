r"""The table of mounts: proc_pid_mountinfo(5), ``fs/proc_namespace.c``.

A line reads ``36 35 98:0 /root /mnt rw,noatime master:1 - ext3 /dev/root rw,errors=continue``; blanks, newlines and
backslashes in names are written as octal escapes such as ``\040``. Every other byte of a name stands as it is, and
whoever may use fusermount(1) chooses names: they may hold what is no UTF-8 and what Python takes for an end of line.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
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

    def super_option(self, name: str) -> str | None:
        """The value of the superblock's option ``name=value``."""
        values = [option.partition("=")[2] for option in self.super_options if option.startswith(f"{name}=")]
        return unescape(values[0]) if values else None


def parse_mountinfo(text: str) -> list[Mount]:
    """All mounts, oldest first; ValueError names a line that cannot be read."""
    return [_parse_line(line) for line in text.split("\n") if line]


def find_mount(mounts: Iterable[Mount], path: str) -> Mount | None:
    """The mount that the absolute ``path`` is in, as the kernel walks it: what is mounted over hides what is below.

    Symbolic links are not followed: nothing is opened. None if the table has no mount above ``path``.
    """
    table = [mount for mount in mounts if _is_within(path, mount.mountpoint)]
    known = {mount.mount_id for mount in table}
    tops = [mount for mount in table if mount.parent_id not in known or mount.parent_id == mount.mount_id]
    here = None
    while tops:
        here = min(tops, key=lambda mount: len(mount.mountpoint))
        table.remove(here)
        tops = [mount for mount in table if mount.parent_id == here.mount_id]
    return here


def _is_within(path: str, folder: str) -> bool:
    return (path + "/").startswith(folder.rstrip("/") + "/")


def _parse_line(line: str) -> Mount:
    try:
        before, after = line.split(" - ", 1)
        mount_id, parent_id, device, root, mountpoint, options, *_optional = before.split(" ")
        kind, source, super_options, *_later = after.split(" ")
        return Mount(
            int(mount_id),
            int(parent_id),
            device,
            unescape(root),
            unescape(mountpoint),
            frozenset(options.split(",")),
            kind,
            unescape(source),
            frozenset(super_options.split(",")),
        )
    except ValueError as error:
        raise ValueError(f"cannot read mountinfo line {line!r}") from error


def unescape(name: str) -> str:
    """A name that the kernel has written into a table of fields held apart by blanks."""
    return _ESCAPE.sub(lambda match: chr(int(match.group(1), 8)), name)
