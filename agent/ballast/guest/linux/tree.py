"""The kernel's file trees, /proc and /sys, under a root that tests point at a folder."""

from __future__ import annotations

import os
from pathlib import Path

_READ_BYTES = 1 << 16


class Tree:
    """Reads and writes kernel files by their path below the root; raises OSError with the path.

    A freeze reads a hundred of them, so by bare system calls: Path and text files take three times as long.
    """

    def __init__(self, root: Path = Path("/")) -> None:
        self.root = root
        self._prefix = str(root).rstrip("/") + "/"

    def path(self, name: str) -> Path:
        """Absolute path of ``name``, as "sys/devices/system/memory"."""
        return self.root / name.lstrip("/")

    def read(self, name: str) -> str:
        """Whole text, without the newline at its end."""
        fd = os.open(self._prefix + name.lstrip("/"), os.O_RDONLY | os.O_CLOEXEC)
        try:
            data = b""
            while chunk := os.read(fd, _READ_BYTES):  # the kernel's tables come in pieces of any length
                data += chunk
        finally:
            os.close(fd)
        return data.decode(errors="surrogateescape").rstrip("\n")

    def write(self, name: str, text: str) -> None:
        """Write in one call: the kernel takes each write() as one order. May block for as long as the order takes."""
        fd = os.open(self._prefix + name.lstrip("/"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC)
        try:
            os.write(fd, text.encode())
        finally:
            os.close(fd)

    def exists(self, name: str) -> bool:
        """Whether there is such a file or folder."""
        return os.path.exists(self._prefix + name.lstrip("/"))  # noqa: PTH110

    def names(self, name: str) -> list[str]:
        """Sorted names in a folder; none if it is absent."""
        try:
            return sorted(os.listdir(self._prefix + name.lstrip("/")))  # noqa: PTH208
        except FileNotFoundError:
            return []
