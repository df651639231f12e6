"""The kernel's file trees, /proc and /sys, under a root that tests point at a folder."""

from __future__ import annotations

from pathlib import Path


class Tree:
    """Reads and writes kernel files by their path below the root; raises OSError with the path."""

    def __init__(self, root: Path = Path("/")) -> None:
        self.root = root

    def path(self, name: str) -> Path:
        """Absolute path of ``name``, as "sys/devices/system/memory"."""
        return self.root / name.lstrip("/")

    def read(self, name: str) -> str:
        """Whole text, without the newline at its end."""
        return self.path(name).read_text(errors="surrogateescape").rstrip("\n")

    def write(self, name: str, text: str) -> None:
        """Write in one call: the kernel takes each write() as one order. May block for as long as the order takes."""
        with self.path(name).open("w") as file:
            file.write(text)

    def exists(self, name: str) -> bool:
        """Whether there is such a file or folder."""
        return self.path(name).exists()

    def names(self, name: str) -> list[str]:
        """Sorted names in a folder; none if it is absent."""
        try:
            return sorted(entry.name for entry in self.path(name).iterdir())
        except FileNotFoundError:
            return []
