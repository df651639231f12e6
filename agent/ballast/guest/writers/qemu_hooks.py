"""The hooks of qemu-ga: ``/etc/qemu/fsfreeze-hook.d/*``, on Red Hat's systems ``/etc/qemu-ga/…``, with freeze or thaw.

qemu-ga runs one program, ``fsfreeze-hook`` beside that folder; the one that ships (scripts/qemu-guest-agent in QEMU)
runs the folder, and always succeeds. We do its part ourselves: the exit status of a hook counts, each has a deadline,
and a thaw has the reverse order. A program of the administrator's own in its place is run instead of the folder.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from ballast.guest.writers.hooks import Hook, HookWriter, is_leftover
from ballast.guest.writers.program import run

_FOLDERS = ("etc/qemu", "etc/qemu-ga")
# All versions have it: ``for file in "$FSFREEZE_D"/* ; do``. The launcher names it too.
_STOCK = b"FSFREEZE_D"
_STOCK_LIMIT_BYTES = 1 << 16


class QemuHooks(HookWriter):
    """Each hook gets freeze, and then thaw, whether it succeeded or not: it knows no other word."""

    def find(self) -> list[Hook]:
        """See ``HookWriter``. By name in each folder; a folder that is two by a link is one."""
        programs = [program for folder in _FOLDERS for program in _programs(self.root / folder)]
        distinct = {program.resolve(): str(program) for program in reversed(programs)}
        return [
            Hook(path, freeze=[path, "freeze"], thaw=[path, "thaw"], abort=[path, "thaw"])
            for path in reversed(distinct.values())
        ]


def _programs(folder: Path) -> Iterator[Path]:
    dispatcher = folder / "fsfreeze-hook"
    if _is_program(dispatcher) and not _is_stock(dispatcher):
        yield dispatcher
        return
    for file in sorted(folder.glob("fsfreeze-hook.d/[!.]*")):
        if _is_program(file) and not is_leftover(file.name):
            yield file


def _is_program(file: Path) -> bool:
    return file.is_file() and os.access(file, os.X_OK)


def _is_stock(dispatcher: Path) -> bool:
    with dispatcher.open("rb") as file:
        return _STOCK in file.read(_STOCK_LIMIT_BYTES)


def main() -> int:
    """The program /usr/lib/ballast/writers/qemu-hooks."""
    return run(QemuHooks())
