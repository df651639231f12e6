"""The command line of `ballastctl backup`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ballast.host import backup_verbs, examples
from ballast.host.config import IF_NOT_HELD
from ballast.host.verbs import Verb

# Adds a command to a group: parents, name, verb, what it is about, examples.
Add = Callable[[list[argparse.ArgumentParser], str, Verb, str, str], argparse.ArgumentParser]


def add_backup(
    group: Any,
    add: Add,
    common: argparse.ArgumentParser,
    for_all: argparse.ArgumentParser,
    add_scope: Callable[[argparse.ArgumentParser, str], None],
) -> None:
    """Add all commands of the group; ``common`` is what every command takes, ``for_all`` the same without a VM."""
    place = _make_place()
    create = add([common, place], "create", backup_verbs.create, "back up a running machine", examples.BACKUP_CREATE)
    _add_create(create)
    add_scope(create, "the guest thaws by itself after it: 10s")
    create.set_defaults(lease=10.0)
    list_ = add([for_all, place], "list", backup_verbs.list_backups, "the backups there are", examples.BACKUP_LIST)
    show = add(
        [common, place],
        "show",
        backup_verbs.show_backup,
        "one backup, its chain and how it was made",
        examples.BACKUP_SHOW,
    )
    verify = add(
        [common, place], "verify", backup_verbs.verify, "whether a backup can be restored", examples.BACKUP_VERIFY
    )
    restore = add([common, place], "restore", backup_verbs.restore, "make disks of a backup", examples.BACKUP_RESTORE)
    prune = add([common, place], "prune", backup_verbs.prune, "remove what is too old to keep", examples.BACKUP_PRUNE)
    repair = add(
        [common, place],
        "repair",
        backup_verbs.repair,
        "take away what an interrupted backup left",
        examples.BACKUP_REPAIR,
    )
    for parser in (list_, show, verify, restore, prune, repair):
        parser.set_defaults(needs_agent=False)
    for parser in (create, repair):
        parser.add_argument("--qmp", metavar="PATH", help="QEMU's QMP socket (default: from host.toml)")
    repair.add_argument("--listen", action="store_true", help=argparse.SUPPRESS)
    for parser in (show, verify, restore):
        parser.add_argument("--id", metavar="ID", help="the backup (default: the last one)")
    _add_restore(restore)
    _add_verify(verify)
    _add_prune(prune)


def _make_place() -> argparse.ArgumentParser:
    place = argparse.ArgumentParser(add_help=False)
    place.add_argument(
        "--target", dest="folder", type=Path, metavar="DIR", help="where backups are (default: from host.toml)"
    )
    place.add_argument(
        "--key-file", type=Path, metavar="FILE", help="the passphrase of encrypted backups (default: from host.toml)"
    )
    return place


def _add_create(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--incremental",
        action="store_true",
        help="only what changed since the last backup; a full one if that is not known",
    )
    add("--level", choices=["application", "filesystem", "none"], default="application", help="default: %(default)s")
    add(
        "--on-failure",
        choices=["abort", "degrade"],
        help="where a part of the freeze fails: give up, or go on without it",
    )
    add(
        "--if-not-held", choices=IF_NOT_HELD, help="what to do with a backup whose freeze did not hold (default: retry)"
    )
    add("--rate", type=int, metavar="MIB", help="copy no more than so many MiB a second")


def _add_restore(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--to", type=Path, required=True, metavar="DIR", help="where the disks go")
    add("--format", choices=["qcow2", "raw"], default="qcow2", help="default: %(default)s")
    add("--disk", action="append", metavar="NAME", help="only this disk; may be repeated")
    add("--overwrite", action="store_true", help="replace disks that are there already")


def _add_verify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--filesystems", action="store_true", help="check its file systems too, in a throw-away machine (libguestfs)"
    )
    parser.add_argument(
        "--boot", action="store_true", help="boot it too, in a throw-away machine, until its agent answers"
    )


def _add_prune(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    for name, what in (
        ("last", "backups"),
        ("hourly", "hours"),
        ("daily", "days"),
        ("weekly", "weeks"),
        ("monthly", "months"),
    ):
        add(
            f"--keep-{name}",
            type=int,
            default=0,
            metavar="N",
            help=f"keep one for each of the last N {what}" if name != "last" else "keep the last N",
        )
    add("--dry-run", action="store_true", help="only tell what would be done")
