"""Whether the file systems in a backup are clean, as the guest would find them after a power failure."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ballast.host.storage import images
from ballast.host.storage.appliance import NOT_INSTALLED
from ballast.host.storage.catalog import Backup
from ballast.host.storage.source import BackupFailed

_START_S = 300.0
# Of one file system; a large one on slow disks takes its time.
_CHECK_S = 4 * 3600.0


@dataclass(frozen=True, slots=True)
class FilesystemCheck:
    """A file system: the name of its disk and the number of its partition, where they are known; else ``device``.

    ``wrong`` is what was said of it, None if it is clean; or it was not looked at, and ``skipped`` tells why.
    """

    disk: str | None
    partition: int | None
    device: str
    type: str
    wrong: str | None
    skipped: str | None

    @property
    def name(self) -> str:
        """For a person."""
        if self.disk is None:
            return self.device
        return self.disk if self.partition is None else f"{self.disk} partition {self.partition}"


async def check_filesystems(place: Path, chain: Sequence[Backup], key_file: Path | None) -> list[FilesystemCheck]:
    """Mount and check all of the last backup of a chain in ``place``, in a throw-away machine; nothing is changed.

    Takes as long as it takes, and ends when it is cancelled. BackupFailed: it could not be looked at.
    """
    backup = chain[-1]
    async with contextlib.AsyncExitStack() as stack:
        sockets = []
        for image in backup.images:
            key = key_file if image.encrypted else None
            path = place / backup.id / image.file
            sockets.append(await stack.enter_async_context(images.show(path, depth=len(chain), key_file=key)))
        words = [sys.executable, "-m", "ballast.host.storage.appliance", *map(str, sockets)]
        process = await images.start(*words)
        try:
            found = [about async for about in _read(process)]
            _, said = await process.communicate()
        finally:
            await images.kill(process)
    if process.returncode == NOT_INSTALLED:
        raise BackupFailed("to look at file systems needs libguestfs (package python3-guestfs), which is not installed")
    if process.returncode != 0:
        raise BackupFailed(f"libguestfs cannot look at {backup.id}: {said.decode(errors='replace').strip()}")
    return [_filesystem(about, [image.disk for image in backup.images]) for about in found]


async def _read(process: asyncio.subprocess.Process) -> Any:
    """Yield what the program tells, each in time; what is not there after that is missed by its exit status."""
    assert process.stdout is not None
    patience_s = _START_S
    while True:
        try:
            async with asyncio.timeout(patience_s):
                line = await process.stdout.readline()
        except TimeoutError as error:
            raise BackupFailed(f"libguestfs told nothing for {patience_s:.0f} s") from error
        if not line:
            return
        about = json.loads(line)
        patience_s = _CHECK_S
        if "ready" not in about:
            yield about


def _filesystem(about: dict[str, Any], disks: Sequence[str]) -> FilesystemCheck:
    number = about.pop("disk")
    return FilesystemCheck(disk=None if number is None else disks[number], **about)
