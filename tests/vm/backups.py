"""Backups of a guest whose databases and files are being written: python -m tests.vm.backups [--libvirt].

One full backup and three increments, by QEMU's QMP or by libvirt, while PostgreSQL, MariaDB and plain writers write.
Inside each frozen window the disks are copied as well. Then each backup is restored, compared with that copy byte for
byte, booted, and looked at from inside: a transaction or a write that the host had heard of before the cut must be
there. The exit status is 1 if anything is missing or differs.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ballast.host.storage.catalog import Backup, Catalog
from tests.vm.backed_up import VM, back_up, boot_under_libvirt, booted, differing, restored, snapshot_of, witnessed
from tests.vm.conftest import boot
from tests.vm.crash import LAYOUTS, check, judge
from tests.vm.crash_loaded import Acknowledged, Loaded, loaded

Result = dict[str, Any]


def make_chain(load: Loaded, folder: Path, count: int) -> list[tuple[Backup, Acknowledged]]:
    """One full backup and increments on it; the reference of each is in ``folder``, under its id."""
    made = []
    for number in range(count):
        load.wait_progress()
        source = witnessed(load.guest, lambda: load.acknowledged, folder)
        backup = asyncio.run(back_up(source, load.guest, folder, incremental=number > 0))
        source.reference.rename(folder / backup.id)
        made.append((backup, source.acknowledged))
    return made


def examine(load: Loaded, folder: Path, backup: Backup, acknowledged: Acknowledged) -> Result:
    """Restore a backup, compare it, boot it, and look for what was acknowledged."""
    started_s = time.monotonic()
    with restored(Catalog(folder / "backups", VM), backup, folder / "restored") as images:
        complaints = differing(images, folder / backup.id)
        shutil.rmtree(folder / backup.id)
        snapshot = snapshot_of(images, acknowledged)
        with booted(load.guest, images) as fresh:
            complaints += judge(snapshot, check(fresh, snapshot, load))
    if backup.held is not True or backup.consistency != "application":
        complaints.append(f"held: {backup.held}, {backup.consistency}")
    sizes = {image.disk: image.image_bytes for image in backup.images}
    return {
        **{"id": backup.id, "kind": backup.kind, "bytes": sizes, "stall_ms": backup.stall_ms},
        **{"acknowledged": acknowledged, "complaints": complaints, "check_s": round(time.monotonic() - started_s)},
    }


def run(load: Loaded, count: int) -> Iterator[Result]:
    """All of it, in a guest that is loaded."""
    load.begin(LAYOUTS[0])
    with tempfile.TemporaryDirectory(prefix="ballast-backups-") as name:
        made = make_chain(load, Path(name), count)
        load.wait_progress()
        with load.paused():
            for backup, acknowledged in made:
                yield examine(load, Path(name), backup, acknowledged)


def main() -> int:
    """Run it, and say what came of each backup."""
    parser = argparse.ArgumentParser(prog="python -m tests.vm.backups", description=__doc__)
    parser.add_argument("--increments", type=int, default=3, help="increments after the full backup (3)")
    parser.add_argument("--libvirt", action="store_true", help="a machine of libvirt's, by its own calls")
    options = parser.parse_args()
    results = []
    with (boot_under_libvirt if options.libvirt else boot)("trixie") as guest, loaded(guest) as load:
        for result in run(load, 1 + options.increments):
            results.append(result)
            sys.stdout.write(json.dumps(result) + "\n")
            sys.stdout.flush()
    bad = sum(bool(result["complaints"]) for result in results)
    sys.stdout.write(f"{len(results)} backups restored and booted, {bad} with complaints\n")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
