"""What the commands of `ballastctl backup` do."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
from collections.abc import Iterator
from pathlib import Path

from ballast.host import backup_view
from ballast.host.config import Backups, Vm
from ballast.host.memory_verbs import finish
from ballast.host.show import progress, progress_bar, put_json, put_tables, say
from ballast.host.storage import backup, deadman, trial
from ballast.host.storage.backup import LiveBackup, Order, Teller
from ballast.host.storage.catalog import Backup, Catalog
from ballast.host.storage.deadman import DeadMan
from ballast.host.storage.filesystems import check_filesystems
from ballast.host.storage.holdings import read_holdings
from ballast.host.storage.libvirt_source import LibvirtSource
from ballast.host.storage.prune import plan_prune
from ballast.host.storage.prune import prune as prune_backups
from ballast.host.storage.qemu_source import QemuSource
from ballast.host.storage.restore import restore as restore_disks
from ballast.host.storage.retention import Keep
from ballast.host.storage.source import Source
from ballast.host.storage.verify import verify as verify_chain
from ballast.host.verbs import Connect, Exit
from ballast.host.window import FreezePlan
from ballast.wire.errors import NoSuchId

TELLER = Teller(say, progress, progress_bar)


async def create(args: argparse.Namespace, connect: Connect) -> int:
    """Back up a running machine; what of it does not come to its end is undone."""
    catalog = _catalog(args)
    with _dead_man(args) as dead_man:
        made = await LiveBackup(_source(args), catalog, _order(args), TELLER).make(connect, dead_man)
    put_json(made) if args.json else put_tables(backup_view.backup_tables(made))
    if made.held is False:
        return Exit.NOT_HELD
    return Exit.PARTIAL if backup_view.is_partial(made) else Exit.DONE


def _order(args: argparse.Namespace) -> Order:
    settings: Backups = args.backups
    vm: Vm = args.vm
    rate_mib_s = args.rate or (settings.rate_mib_s and max(1, settings.rate_mib_s // settings.backups_at_once))
    level = None if args.level == "none" else args.level
    return Order(
        level=args.level,
        incremental=args.incremental,
        plan=FreezePlan(args.lease, max(args.lease, 600.0), args.mountpoint, args.exclude, level, args.on_failure),
        if_not_held=args.if_not_held or settings.if_not_held,
        provider="libvirt" if vm.libvirt else "qemu",
        fleece=settings.fleece,
        backups_at_once=settings.backups_at_once,
        freezes_at_once=settings.freezes_at_once,
        rate_bytes_s=rate_mib_s << 20 if rate_mib_s else None,
        key_file=_key_file(args),
    )


def _source(args: argparse.Namespace) -> Source:
    settings: Backups = args.backups
    vm: Vm = args.vm
    fleece = settings.fleece / _catalog(args).folder.name
    if vm.libvirt:
        return LibvirtSource(vm.libvirt, fleece, vm.tpm_state)
    return QemuSource(args.qmp, fleece, settings.fleece_timeout_s)


def _catalog(args: argparse.Namespace) -> Catalog:
    return Catalog(args.folder or args.backups.target, args.target)


@contextlib.contextmanager
def _dead_man(args: argparse.Namespace) -> Iterator[DeadMan]:
    """One that is told of the same machine and the same places."""
    words = ["backup", "repair", args.target, "--listen", "--config", str(args.config)]
    for option, value in (("--target", args.folder), ("--qmp", args.qmp), ("--token-file", args.token_file)):
        words += [option, str(value)] if value is not None else []
    with DeadMan.started(words) as dead_man:
        yield dead_man


async def repair(args: argparse.Namespace, connect: Connect) -> int:
    """Take away what an interrupted backup left, and say what that was."""
    catalog = _catalog(args)

    async def mend() -> None:
        with catalog.lock():
            said = await backup.repair(_source(args), catalog, say)
        if not args.listen:
            put_json({"repaired": said}) if args.json else put_tables(backup_view.repair_tables(said))

    if args.listen:
        await deadman.listen(connect, mend)
    else:
        await finish(mend())
    return Exit.DONE


async def list_backups(args: argparse.Namespace, connect: Connect) -> int:
    """Show all backups of a machine, damaged ones too; or which machines have any."""
    if args.target is None:
        found = await asyncio.to_thread(read_holdings, args.folder or args.backups.target)
        put_json({"machines": found}) if args.json else put_tables(backup_view.holdings_tables(found))
        return Exit.PARTIAL if any(one.damaged for one in found) else Exit.DONE
    backups, damaged = await asyncio.to_thread(_catalog(args).read)
    put_json({"backups": backups, "damaged": damaged}) if args.json else put_tables(
        backup_view.list_tables(args.target, backups, damaged)
    )
    return Exit.PARTIAL if damaged else Exit.DONE


async def show_backup(args: argparse.Namespace, connect: Connect) -> int:
    """Show one backup, and all that it takes to restore it."""
    chain = await asyncio.to_thread(_find, args)
    put_json({"backup": chain[-1], "chain": [one.id for one in chain]}) if args.json else put_tables(
        backup_view.backup_tables(chain[-1], chain)
    )
    return Exit.DONE


def _find(args: argparse.Namespace) -> list[Backup]:
    """The chain of the backup that is asked for, or of the last one. NoSuchId, Damaged."""
    catalog = _catalog(args)
    if args.id:
        return catalog.chain(args.id)
    if (last := catalog.last()) is None:
        raise NoSuchId(f"{catalog.folder} has no backup that can be restored")
    return catalog.chain(last.id)


async def verify(args: argparse.Namespace, connect: Connect) -> int:
    """Read a backup and all that it takes, and compare."""
    chain = await asyncio.to_thread(_find, args)
    place, key_file, filesystems, booted = _catalog(args).folder, _key_file(args), None, None
    wrong = await verify_chain(place, chain, key_file=key_file, bar=progress_bar)
    if args.filesystems and not wrong:
        with progress("looking at the file systems"):
            filesystems = await check_filesystems(place, chain, key_file)
        wrong = [f"{one.name} ({one.type}): {one.wrong}" for one in filesystems if one.wrong]
    if args.boot and not wrong:
        with progress("booting it on trial"):
            booted = await trial.boot(place, chain, key_file)
        wrong = [booted.wrong] if booted.wrong else []
    if args.json:
        ids = [one.id for one in chain]
        put_json({"backup": ids[-1], "chain": ids, "wrong": wrong, "filesystems": filesystems, "boot": booted})
    else:
        put_tables(backup_view.verify_tables(chain, wrong, filesystems, booted))
    return Exit.FAILED if wrong else Exit.DONE


async def restore(args: argparse.Namespace, connect: Connect) -> int:
    """Make disks of a backup."""
    chain = await asyncio.to_thread(_find, args)
    made = await restore_disks(
        _catalog(args).folder,
        chain,
        args.to,
        disks=args.disk,
        format_=args.format,
        overwrite=args.overwrite,
        key_file=_key_file(args),
        bar=progress_bar,
    )
    put_json({"backup": chain[-1].id, "disks": [str(path) for path in made]}) if args.json else put_tables(
        backup_view.restore_tables(chain[-1], made)
    )
    return Exit.DONE


async def prune(args: argparse.Namespace, connect: Connect) -> int:
    """Remove what no rule keeps."""
    catalog = _catalog(args)
    keep = Keep(*(getattr(args, f"keep_{name}") for name in ("last", "hourly", "daily", "weekly", "monthly")))
    with catalog.lock():
        await asyncio.to_thread(catalog.sweep)
        todo = await asyncio.to_thread(plan_prune, catalog, keep)
        if not args.dry_run:
            await prune_backups(catalog, todo, key_file=_key_file(args), bar=progress_bar, working=progress)
    put_json(todo) if args.json else put_tables(backup_view.prune_tables(todo, is_done=not args.dry_run))
    return Exit.DONE


def _key_file(args: argparse.Namespace) -> Path | None:
    settings: Backups = args.backups
    given: Path | None = args.key_file
    return given or settings.key_file
