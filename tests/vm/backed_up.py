"""A loaded guest and its backups: made with a reference of the disks inside the frozen window, restored, booted."""

from __future__ import annotations

import asyncio
import dataclasses
import filecmp
import itertools
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from ballast.host.agent import Agent
from ballast.host.show import progress, progress_bar
from ballast.host.storage.backup import LiveBackup, Order, Teller
from ballast.host.storage.catalog import Backup, Catalog
from ballast.host.storage.deadman import DeadMan
from ballast.host.storage.libvirt_source import LibvirtSource
from ballast.host.storage.qemu_source import QemuSource
from ballast.host.storage.restore import restore
from ballast.host.storage.source import Source
from ballast.host.window import FreezePlan
from tests.lab.guest import Guest
from tests.lab.image import build
from tests.lab.libvirt import libvirt_daemon
from tests.lab.libvirt_guest import LibvirtGuest
from tests.vm.conftest import DISKS, TOKEN, packages
from tests.vm.crash import SCSI
from tests.vm.crash_loaded import Acknowledged, Snapshot

VM = "lab"
FLEECE_TIMEOUT_S = 10  # two cores, and everything is emulated
LEASE_S = 60.0
_BLOCK_BYTES = 65536
# libvirt knows a machine's disks by their targets alone.
OWN_NAMES = {"vda": "root", "vdb": "data0", "vdc": "data1", "vdd": "data2"}


class Witness:
    """A source that keeps, inside the frozen window, what the disks hold and which writes were acknowledged by then."""

    acknowledged: Acknowledged
    reference: Path
    guest: Guest
    ask: Callable[[], Acknowledged]

    async def cut(self) -> None:
        """Cut; and while all is frozen, copy what QEMU writes to."""
        self.acknowledged = self.ask()
        await super().cut()  # type: ignore[misc]  # of the source that it is mixed into
        await asyncio.to_thread(copy_disks, self.guest, self.reference)


class WitnessedQemu(Witness, QemuSource):
    """By QMP."""


class WitnessedLibvirt(Witness, LibvirtSource):
    """By libvirt's calls."""


def witnessed(guest: Guest, acknowledged: Callable[[], Acknowledged], folder: Path) -> WitnessedQemu | WitnessedLibvirt:
    """What to make a backup of a guest from; the reference of each goes to a folder in ``folder``."""
    stop_discarding(guest)
    fleece = folder / "fleece" / VM
    source: WitnessedQemu | WitnessedLibvirt
    if isinstance(guest, LibvirtGuest):
        source = WitnessedLibvirt(guest.target, fleece)
    else:
        source = WitnessedQemu(str(guest.qmp_path), fleece, FLEECE_TIMEOUT_S)
    source.acknowledged, source.reference, source.guest, source.ask = {}, folder / "reference", guest, acknowledged
    return source


def stop_discarding(guest: Guest) -> None:
    """Have btrfs no more discard what it has freed: it does so while frozen too, and the reference would have holes.

    Seen on Linux 6.12: discards, and no writes, in 3 of 9 windows of 5 s. What was cut before is right all the same.
    """
    guest.run("findmnt --raw --noheadings --types btrfs --output TARGET | xargs -r -n 1 mount -o remount,nodiscard")


def copy_disks(guest: Guest, folder: Path) -> None:
    """Make raw copies of a guest's disks, in which nothing is under way."""
    folder.mkdir(exist_ok=True)
    if isinstance(guest, LibvirtGuest):
        images = {OWN_NAMES[target]: (path, "qcow2") for target, path in guest.images.items()}
    else:
        images = {"root": (guest.dir / "root.qcow2", "qcow2")} | {disk.name: (disk.path, "raw") for disk in guest.disks}
    for name, (path, format_) in images.items():
        run("qemu-img", "convert", "-U", "-f", format_, "-O", "raw", path, folder / f"{name}.raw")


@contextmanager
def boot_under_libvirt(suite: str) -> Iterator[LibvirtGuest]:
    """As ``boot``, but a libvirt of the tests' own starts it."""
    with tempfile.TemporaryDirectory(prefix="ballast-libvirt-") as name:
        Path(name).chmod(0o755)
        with (
            libvirt_daemon(Path(name) / "daemon", user="root") as uri,
            LibvirtGuest(uri, build(suite), disks=DISKS, token=TOKEN) as guest,
        ):
            guest.wait_boot()
            guest.install(packages())
            yield guest


def target_of(guest: Guest) -> str:
    """Connect string of the guest's agent."""
    is_on_vsock = not isinstance(guest, LibvirtGuest)
    return f"unix:{guest.vsock_path}?connect=640" if is_on_vsock else f"unix:{guest.ballast_port}"


def run(*argv: str | Path) -> None:
    """Run a program of the host. CalledProcessError."""
    subprocess.run([str(word) for word in argv], check=True, capture_output=True)


def order_of(guest: Guest, folder: Path, *, incremental: bool) -> Order:
    """As `ballastctl backup create` does by default."""
    return Order(
        level="application",
        incremental=incremental,
        plan=FreezePlan(lease_s=LEASE_S, level="application"),
        if_not_held="retry",
        provider="libvirt" if isinstance(guest, LibvirtGuest) else "qemu",
        fleece=folder / "fleece",
    )


async def back_up(source: Source, guest: Guest, folder: Path, *, incremental: bool) -> Backup:
    """Make one backup of a guest."""
    connect = partial(Agent.connect, target_of(guest), TOKEN)
    teller = Teller(print, progress, progress_bar)
    with DeadMan.started(
        ["backup", "repair", VM, "--listen", "--config", str(write_config(guest, folder))]
    ) as dead_man:
        live = LiveBackup(
            source, Catalog(folder / "backups", VM), order_of(guest, folder, incremental=incremental), teller
        )
        return await live.make(connect, dead_man)


def write_config(guest: Guest, folder: Path) -> Path:
    """Write the host's configuration for ballastctl, with this guest as a VM of it."""
    token = folder / "token"
    token.touch(0o600)
    token.write_text(TOKEN)
    config = folder / "host.toml"
    place = f'libvirt = "{guest.target}"' if isinstance(guest, LibvirtGuest) else f'qmp = "unix:{guest.qmp_path}"'
    config.write_text(
        f'[vm.{VM}]\nagent = "{target_of(guest)}"\n{place}\n'
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
        yield {OWN_NAMES.get(path.stem, path.stem.removeprefix("disk-")): path for path in made}
    finally:
        for path in made:
            path.unlink()


def differing(images: dict[str, Path], reference: Path) -> list[str]:
    """A sentence for each disk that is not, byte for byte, what was copied in the window."""
    found = []
    for name, path in images.items():
        copied = reference / f"{name}.raw"
        if not filecmp.cmp(path, copied, shallow=False):
            found.append(f"{name} differs: {_how(path, copied)}")
    return found


def _how(restored: Path, copied: Path) -> str:
    """Where two images differ, and how much of that is zero in either: discarded, or never copied."""
    places, zeros = list[int](), [0, 0]
    with restored.open("rb") as one, copied.open("rb") as other:
        for number in itertools.count():
            pair = one.read(_BLOCK_BYTES), other.read(_BLOCK_BYTES)
            if not any(pair):
                break
            if pair[0] != pair[1]:
                places.append(number * _BLOCK_BYTES)
                zeros = [count + (not any(block)) for count, block in zip(zeros, pair, strict=True)]
    where = ", ".join(map(hex, places[:8]))
    return f"{len(places)} blocks, {zeros[0]} zero in the backup and {zeros[1]} in the reference, first at {where}"


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
