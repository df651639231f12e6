"""A loaded guest and its backups: made with a reference of the disks inside the frozen window, restored, booted."""

from __future__ import annotations

import asyncio
import dataclasses
import filecmp
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from ballast.host.agent import Agent
from ballast.host.show import progress, progress_bar
from ballast.host.storage.backup import LiveBackup, Order, Teller
from ballast.host.storage.catalog import Backup, Catalog
from ballast.host.storage.deadman import DeadMan
from ballast.host.storage.qemu_source import QemuSource
from ballast.host.storage.restore import restore
from ballast.host.window import FreezePlan
from tests.lab.guest import Guest
from tests.vm.conftest import TOKEN
from tests.vm.crash import SCSI
from tests.vm.crash_loaded import Acknowledged, Snapshot

VM = "lab"
FLEECE_TIMEOUT_S = 10  # two cores, and everything is emulated
LEASE_S = 60.0


class WitnessedSource(QemuSource):
    """A source that keeps, inside the frozen window, what the disks hold and which writes were acknowledged by then."""

    def __init__(self, guest: Guest, acknowledged: Callable[[], Acknowledged], folder: Path) -> None:
        super().__init__(str(guest.qmp_path), folder / "fleece" / VM, FLEECE_TIMEOUT_S)
        self.acknowledged: Acknowledged = {}
        self.reference = folder / "reference"
        self._guest = guest
        self._ask = acknowledged

    async def cut(self) -> None:
        """Cut; and while all is frozen, copy what QEMU writes to."""
        self.acknowledged = self._ask()
        await super().cut()
        await asyncio.to_thread(copy_disks, self._guest, self.reference)


def copy_disks(guest: Guest, folder: Path) -> None:
    """Make raw copies of a guest's disks, in which nothing is under way."""
    folder.mkdir(exist_ok=True)
    images = {"root": (guest.dir / "root.qcow2", "qcow2")} | {disk.name: (disk.path, "raw") for disk in guest.disks}
    for name, (path, format_) in images.items():
        run("qemu-img", "convert", "-U", "-f", format_, "-O", "raw", path, folder / f"{name}.raw")


def run(*argv: str | Path) -> None:
    """Run a program of the host. CalledProcessError."""
    subprocess.run([str(word) for word in argv], check=True, capture_output=True)


def order_of(folder: Path, *, incremental: bool) -> Order:
    """As `ballastctl backup create` does by default."""
    return Order(
        level="application",
        incremental=incremental,
        plan=FreezePlan(lease_s=LEASE_S, level="application"),
        if_not_held="retry",
        provider="qemu",
        fleece=folder / "fleece",
    )


async def back_up(source: QemuSource, guest: Guest, folder: Path, *, incremental: bool) -> Backup:
    """Make one backup of a guest."""
    connect = partial(Agent.connect, f"unix:{guest.vsock_path}?connect=640", TOKEN)
    teller = Teller(print, progress, progress_bar)
    with DeadMan.started(
        ["backup", "repair", VM, "--listen", "--config", str(write_config(guest, folder))]
    ) as dead_man:
        live = LiveBackup(source, Catalog(folder / "backups", VM), order_of(folder, incremental=incremental), teller)
        return await live.make(connect, dead_man)


def write_config(guest: Guest, folder: Path) -> Path:
    """Write the host's configuration for ballastctl, with this guest as a VM of it."""
    token = folder / "token"
    token.touch(0o600)
    token.write_text(TOKEN)
    config = folder / "host.toml"
    config.write_text(
        f'[vm.{VM}]\nagent = "unix:{guest.vsock_path}?connect=640"\nqmp = "unix:{guest.qmp_path}"\n'
        f'token-file = "{token}"\n\n[backup]\ntarget = "{folder / "backups"}"\nfleece = "{folder / "fleece"}"\n'
        f"fleece-timeout-s = {FLEECE_TIMEOUT_S}\n"
    )
    return config


@contextmanager
def restored(catalog: Catalog, backup: Backup, folder: Path) -> Iterator[dict[str, Path]]:
    """All disks of a backup as raw images, for this time."""
    made = asyncio.run(
        restore(
            catalog.folder,
            catalog.chain(backup.id),
            folder,
            disks=None,
            format_="raw",
            overwrite=True,
            key_file=None,
            bar=progress_bar,
        )
    )
    try:
        yield {path.stem.removeprefix("disk-"): path for path in made}
    finally:
        for path in made:
            path.unlink()


def differing(images: dict[str, Path], reference: Path) -> list[str]:
    """The disks that are not, byte for byte, what was copied in the window."""
    return [name for name, path in images.items() if not filecmp.cmp(path, reference / f"{name}.raw", shallow=False)]


@contextmanager
def booted(guest: Guest, images: dict[str, Path]) -> Iterator[Guest]:
    """A machine whose root is a restored one; its other disks are for crash_check to attach."""
    image = dataclasses.replace(guest.image, root=images["root"])
    with Guest(image, vsock=False, arguments=SCSI, append="fstab=no") as fresh:
        fresh.wait_boot()
        yield fresh


def snapshot_of(images: dict[str, Path], acknowledged: Acknowledged) -> Snapshot:
    """The restored data disks, as crash_check takes them."""
    return Snapshot({name: (path, "raw") for name, path in images.items() if name != "root"}, acknowledged)
