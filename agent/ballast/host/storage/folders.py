"""Folders whose content is on the disk, for nobody else to look into. All of it blocks; OSError."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, where there are none, to stay there."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
        sync(folder.parent)


def sync_all(folder: Path) -> None:
    """Close all below a folder to other users, whoever made it, and have it on the disk."""
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not path.is_symlink():
            sync_all(path)
        elif path.is_file():
            sync(path, 0o600)
    sync(folder, 0o700)


def sync(path: Path, mode: int | None = None) -> None:
    """Have a file, or the names in a folder, on the disk; with ``mode``, its permissions too."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if mode is not None:
            # A file system that knows no modes is closed by its mount options.
            with contextlib.suppress(PermissionError):
                os.fchmod(fd, mode)
        os.fsync(fd)
    finally:
        os.close(fd)


def take_away(folder: Path) -> None:
    """Remove a folder and all that is in it, if it is there."""
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(folder)
