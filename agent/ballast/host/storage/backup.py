"""A live backup in six steps: look, prepare, freeze, cut, thaw, copy. The guest stands still from freeze to thaw.

It is in the catalogue when it is whole, or it never was: whatever happens on the way is undone, by us, by the dead man
or by ``repair``.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from ballast import __version__
from ballast.host.config import IfNotHeld
from ballast.host.quantity import format_size
from ballast.host.storage import images
from ballast.host.storage.catalog import Backup, Catalog, Image
from ballast.host.storage.copy import copy
from ballast.host.storage.cut import Connect, Cut, cut_frozen, cut_running
from ballast.host.storage.deadman import DeadMan
from ballast.host.storage.limits import slot
from ballast.host.storage.source import BackupFailed, Disk, Export, Source
from ballast.host.storage.threads import to_its_end, undisturbed
from ballast.host.window import FreezePlan
from ballast.wire.errors import AgentError

Level = Literal["application", "filesystem", "none"]

ATTEMPTS = 3
TURN_S = 3600.0
# What else a backup writes: metadata of images, JSON, what tells of the machine.
_SPARE_BYTES = 64 << 20
_METADATA_SHARE = 1 / 512


class NotHeld(BackupFailed):
    """The guest was not frozen until the disks were cut, so the backup would not be what was asked for."""


@dataclass(frozen=True, slots=True)
class Order:
    """What is asked for. ``rate_bytes_s`` is for this one; ``key_file`` holds the passphrase of its images."""

    level: Level
    incremental: bool
    plan: FreezePlan
    if_not_held: IfNotHeld
    provider: Literal["qemu", "libvirt"]
    fleece: Path
    backups_at_once: int = 2
    freezes_at_once: int = 1
    rate_bytes_s: int | None = None
    key_file: Path | None = None


@dataclass(frozen=True, slots=True)
class Teller:
    """How a person hears of it: words, and a bar for what takes its time."""

    say: Callable[[str], None]
    working: Callable[[str], AbstractContextManager[None]]
    bar: Callable[[str, int], AbstractContextManager[Callable[[int], None]]]


class LiveBackup:
    """One order for one machine."""

    def __init__(self, source: Source, catalog: Catalog, order: Order, teller: Teller) -> None:
        self._source = source
        self._catalog = catalog
        self._order = order
        self._teller = teller

    async def make(self, connect: Connect, deadman: DeadMan) -> Backup:
        """Make the backup. BackupFailed and AgentError's other classes: there is none then, and nothing is left."""
        try:
            return await self._make(connect, deadman)
        except OSError as error:
            place = error.filename or self._catalog.folder
            raise BackupFailed(f"{place}: {error.strerror or error}") from error

    async def _make(self, connect: Connect, deadman: DeadMan) -> Backup:
        order = self._order
        with self._catalog.lock():
            async with slot("backup", order.backups_at_once, TURN_S):
                await repair(self._source, self._catalog, self._teller.say)
                attempts = ATTEMPTS if order.if_not_held == "retry" else 1
                for left in reversed(range(attempts)):
                    try:
                        return await self._attempt(connect, deadman)
                    except NotHeld as error:
                        if not left:
                            raise
                        self._teller.say(f"{error.desc}; trying again")
        raise AssertionError("the last attempt returns or raises")

    async def _attempt(self, connect: Connect, deadman: DeadMan) -> Backup:
        with self._teller.working("looking at the machine"):
            base, why_full, disks = await self._survey()
            await asyncio.to_thread(self._check_space, disks, base)
            await self._look_ahead(connect)
        new = self._catalog.new_id(datetime.now(UTC))
        try:
            folder = await to_its_end(self._catalog.begin, new)
            with self._teller.working("freezing, cutting and thawing"):
                await self._source.prepare(new, base.id if base else None)
                cut = await self._cut(connect, deadman)
            (machine := folder / "machine").mkdir(mode=0o700)
            await self._source.describe(machine)
            copied = [await self._copy(one, disks, folder, base) for one in await self._source.exports()]
            backup = self._record(new, base, why_full, cut, [image.disk for image in copied])
            with self._teller.working("checking in"):
                made = await to_its_end(self._catalog.commit, backup, copied)
        finally:
            await undisturbed(self._finish(new))
        return made

    async def _survey(self) -> tuple[Backup | None, str | None, Sequence[Disk]]:
        """What the new backup is based on, or why on nothing."""
        last = await asyncio.to_thread(self._catalog.last)
        disks = await self._source.survey(last.id if last else None)
        if any(disk.name == "backup" for disk in disks):
            raise BackupFailed("a disk named backup cannot be kept beside backup.json; give its device another id")
        if not self._order.incremental:
            return None, "asked for", disks
        if last is None:
            return None, "there is no backup yet", disks
        why = _why_full(last, disks)
        if why:
            self._teller.say(f"a full backup is made: {why}")
        return (None if why else last), why, disks

    def _check_space(self, disks: Sequence[Disk], base: Backup | None) -> None:
        copied_bytes = sum(_to_copy_bytes(disk, base) for disk in disks)
        needed_bytes = _SPARE_BYTES + round(copied_bytes * (1 + _METADATA_SHARE))
        free_bytes = _free_bytes(self._catalog.folder)
        if free_bytes < needed_bytes:
            raise BackupFailed(
                f"{self._catalog.folder} has {format_size(free_bytes)} free, and the backup may take "
                f"{format_size(needed_bytes)}; nothing was frozen"
            )
        if _free_bytes(self._order.fleece) < _SPARE_BYTES:
            raise BackupFailed(f"{self._order.fleece} is full; nothing was frozen")

    async def _look_ahead(self, connect: Connect) -> None:
        """Say what may go wrong in the freeze; whether to freeze all the same is the agent's policy."""
        if self._order.level == "none":
            return
        plan = self._order.plan
        async with connect() as agent:
            told = await agent.quiesce_forecast(round(1000 * plan.lease_s), plan.mountpoints, plan.exclude)
        for risk in told.risks:
            self._teller.say(f"risk: {risk.detail}")

    async def _cut(self, connect: Connect, deadman: DeadMan) -> Cut:
        order = self._order
        if order.level == "none":
            return await cut_running(self._source)
        cut = await cut_frozen(self._source, connect, order.plan, deadman, order.freezes_at_once, self._teller.say)
        if not cut.held and order.if_not_held != "keep":
            reason = cut.ended.reason if cut.ended else "the guest did not tell"
            raise NotHeld(f"the guest was not frozen until its disks were cut ({reason})")
        return cut

    async def _copy(self, export: Export, disks: Sequence[Disk], folder: Path, base: Backup | None) -> Image:
        disk = next(disk for disk in disks if disk.name == export.disk)
        path, order = folder / f"{disk.name}.qcow2", self._order
        backing = f"../{base.id}/{disk.name}.qcow2" if base else None
        depth = 1 + len(await to_its_end(self._catalog.chain, base.id)) if base else 1
        await images.create(path, disk.bytes, backing=backing, key_file=order.key_file)
        async with images.serve(path, depth=depth, key_file=order.key_file) as socket:
            with self._teller.bar(f"copying {disk.name}", _to_copy_bytes(disk, base)) as advance:
                await copy(export, socket, rate_bytes_s=order.rate_bytes_s, advance=advance)
        with self._teller.working(f"adding up {disk.name}"):
            return await asyncio.to_thread(
                Image.of, path, disk=disk.name, bytes_=disk.bytes, base=backing, encrypted=order.key_file is not None
            )

    def _record(self, new: str, base: Backup | None, why_full: str | None, cut: Cut, disks: Sequence[str]) -> Backup:
        begun, ended = cut.begun, cut.ended
        return Backup(
            id=new,
            vm=self._catalog.vm,
            made=datetime.fromtimestamp(cut.made_s, UTC).isoformat(timespec="milliseconds"),
            kind="incremental" if base else "full",
            base=base.id if base else None,
            chain=base.chain if base else new,
            why_full=why_full,
            level=self._order.level,
            consistency=cut.consistency,
            held=cut.held,
            frozen_ms=ended.held_ms if ended else None,
            stall_ms=cut.stall_ms,
            filesystems=begun.filesystems if begun else [],
            writers=begun.writers if begun else [],
            risks=begun.risks if begun else [],
            disks=list(disks),
            provider=self._order.provider,
            ballast=__version__,
        )

    async def _finish(self, new: str) -> None:
        """Undo what was done to the machine; a backup that is catalogued stays, whatever comes of that."""
        last = await to_its_end(self._catalog.last)
        try:
            await self._source.finish(keep=last is not None and last.id == new)
        except (AgentError, OSError) as error:
            self._teller.say(f"{getattr(error, 'desc', error)}; `ballastctl backup repair` takes away what is left")
        await to_its_end(self._catalog.discard, new)


async def repair(source: Source, catalog: Catalog, tell: Callable[[str], None]) -> list[str]:
    """Take away what interrupted backups left, in the machine and in the catalogue; a sentence for each."""
    last = await asyncio.to_thread(catalog.last)
    said = list(await source.repair(last.id if last else None))
    said += await to_its_end(catalog.sweep)
    for sentence in said:
        tell(sentence)
    return said


def _why_full(last: Backup, disks: Sequence[Disk]) -> str | None:
    names = {disk.name for disk in disks}
    if names != set(last.disks):
        return f"the machine's disks are {', '.join(sorted(names))}, and in {last.id} there are {', '.join(last.disks)}"
    return next((disk.why_full for disk in disks if disk.why_full), None)


def _to_copy_bytes(disk: Disk, base: Backup | None) -> int:
    return disk.changed_bytes if base and disk.changed_bytes is not None else disk.used_bytes


def _free_bytes(folder: Path) -> int:
    while not folder.exists():
        folder = folder.parent
    about = os.statvfs(folder)
    return about.f_bavail * about.f_frsize
