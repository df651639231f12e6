"""What a backup reads from: a virtual machine's disks as they were at one moment.

A source is one machine, during one backup. ``qemu_source`` and ``libvirt_source`` provide it; ``backup`` drives it:
``survey``, ``prepare``, then inside the frozen window ``cut``, after it ``exports``, and ``finish`` whatever happened.

What changed since a backup is kept by the machine itself, in a dirty bitmap of each disk (libvirt: a checkpoint) that
is named after that backup. It may hold a block too many, never one too few.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ballast.wire.errors import AgentError

# Before the id of a backup: names of bitmaps and checkpoints, and of what else is ours inside QEMU.
PREFIX = "ballast-"


class BackupFailed(AgentError):
    """The backup was given up; the text says at what. The machine is as it was before."""


class NotRepairable(AgentError):
    """Something of an interrupted backup is left that cannot be taken away from here; the text names it."""


@dataclass(frozen=True, slots=True)
class Disk:
    """A disk to back up. ``name`` is fit for a file's name and stays the same as long as the machine keeps the disk.

    ``used_bytes`` is at least what a full backup has to copy; ``changed_bytes`` what an increment has to, None if an
    increment cannot be made, and then ``why_full`` tells the reason.
    """

    name: str
    bytes: int
    used_bytes: int
    changed_bytes: int | None = None
    why_full: str | None = None


@dataclass(frozen=True, slots=True)
class Export:
    """A disk at the moment of the cut, to be read by NBD: on a UNIX socket, by the export's name.

    ``bitmap`` is the metadata context that marks (bit 0) what an increment needs; None means: all of it.
    """

    disk: str
    socket: Path
    name: str
    bitmap: str | None = None


class Source(Protocol):
    """One machine for one backup. All methods have deadlines, and raise AgentError's classes."""

    async def survey(self, base: str | None) -> Sequence[Disk]:
        """Look at all disks; ``base`` is the id of the backup that an increment would be based on."""
        ...

    async def prepare(self, new: str, base: str | None) -> None:
        """Make ready all that can be made ready before the freeze; ``base`` is None for a full backup."""
        ...

    async def cut(self) -> None:
        """Fix the moment, for all disks at once. Milliseconds: the guest is frozen meanwhile."""
        ...

    async def exports(self) -> Sequence[Export]:
        """Begin to serve the disks as they were at the cut."""
        ...

    async def finish(self, *, keep: bool) -> None:
        """Take away everything that was made for this backup.

        With ``keep`` the backup is in the catalogue: from now on changes are told since it. Otherwise they are told
        since its base, as if it had never been tried.
        """
        ...

    async def repair(self, last: str | None) -> Sequence[str]:
        """Take away what interrupted backups left, a sentence for each; ``last`` is the last one in the catalogue.

        Also after a backup that was catalogued but not finished. NotRepairable.
        """
        ...

    async def describe(self, folder: Path) -> None:
        """Write what the machine needs to live again, apart from its disks, into files in this folder."""
        ...
