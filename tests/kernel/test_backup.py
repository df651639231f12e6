"""Whole backups of a real QEMU whose guest is this test: none is ever wrong, whoever fails or is killed."""

import asyncio
import contextlib
import itertools
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ballast.host.storage import images
from ballast.host.storage.backup import LiveBackup, Order, Teller
from ballast.host.storage.catalog import Backup, Catalog
from ballast.host.storage.prune import plan_prune, prune
from ballast.host.storage.qemu_source import QemuSource
from ballast.host.storage.restore import restore
from ballast.host.storage.retention import Keep
from ballast.host.storage.source import BackupFailed
from ballast.host.storage.verify import verify
from ballast.host.window import FreezePlan
from ballast.wire.errors import BadRequest, Busy
from tests.lab.still_machine import StillMachine, still_machine

MIB = 1 << 20
SIZES = {"root": 48 * MIB, "data": 24 * MIB + 512}


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[StillMachine]:
    paths = {name: tmp_path / f"{name}.qcow2" for name in SIZES}
    for name, path in paths.items():
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(path), str(SIZES[name])], check=True)
    held = {name: bytearray(bytes_) for name, bytes_ in SIZES.items()}
    with still_machine(tmp_path / "qemu", paths, held) as machine:
        machine.scribble(20)
        yield machine


class Lab:
    """Backups of the machine, and what it held at each cut."""

    def __init__(self, machine: StillMachine, folder: Path) -> None:
        self.machine = machine
        self.folder = folder
        self.catalog = Catalog(folder / "backups", "lab")
        self.said: list[str] = []
        self.held: dict[str, dict[str, bytes]] = {}
        self.at_cut: dict[str, bytes] = {}
        self.before_finish: Callable[[], object] = lambda: None

    async def make(self, *, incremental: bool) -> Backup:
        """One backup, the guest writing all the time."""
        lab = self

        class Source(QemuSource):
            async def cut(self) -> None:
                lab.machine.scribble(3)
                await super().cut()
                lab.at_cut = lab.machine.snapshot()
                lab.machine.scribble(10)

            async def finish(self, *, keep: bool) -> None:
                lab.before_finish()
                await super().finish(keep=keep)

        fleece = self.folder / "fleece"
        source = Source(str(self.machine.qmp), fleece / "lab", 5)
        order = Order("none", incremental, FreezePlan(), "retry", "qemu", fleece)
        made = await LiveBackup(source, self.catalog, order, self.teller()).make(None, None)  # type: ignore[arg-type]  # nothing is frozen
        self.held[made.id] = self.at_cut
        self.machine.scribble(5)
        return made

    def teller(self) -> Teller:
        @contextlib.contextmanager
        def working(_what: str) -> Iterator[None]:
            self.machine.scribble(2)
            yield

        @contextlib.contextmanager
        def bar(_what: str, _total: int) -> Iterator[Callable[[int], None]]:
            self.machine.scribble(2)
            yield lambda _bytes: None

        return Teller(self.said.append, working, bar)

    def assert_right(self, made: Backup) -> None:
        """Every disk of the backup holds what the machine held."""
        for image in made.images:
            raw = self.folder / "restored.raw"
            path = self.catalog.folder / made.id / image.file
            subprocess.run(["qemu-img", "convert", "-O", "raw", str(path), str(raw)], check=True)
            assert raw.read_bytes()[: image.bytes] == self.held[made.id][image.disk], (made.id, image.disk)

    def assert_nothing_left(self) -> None:
        assert self.machine.nodes_of_ours() == []
        assert self.catalog.partials() == []
        assert not (self.folder / "fleece" / "lab").exists()


@pytest.fixture
def lab(machine: StillMachine, tmp_path: Path) -> Lab:
    return Lab(machine, tmp_path)


async def test_a_full_backup_and_three_increments_are_right(lab: Lab) -> None:
    made = [await lab.make(incremental=bool(number)) for number in range(4)]
    assert [one.kind for one in made] == ["full", "incremental", "incremental", "incremental"]
    for one in made:
        lab.assert_right(one)
    lab.assert_nothing_left()
    assert lab.catalog.backups() == made


async def test_the_first_one_is_full_and_says_why(lab: Lab) -> None:
    made = await lab.make(incremental=True)
    assert (made.kind, made.why_full) == ("full", "there is no backup yet")


async def test_a_target_that_runs_full_costs_the_backup_and_nothing_else(lab: Lab) -> None:
    await lab.make(incremental=False)
    target = lab.catalog.folder.parent
    free_bytes = sum(path.stat().st_blocks * 512 for path in target.rglob("*") if path.is_file())
    lab.machine.write("root", 0, 40 * MIB)
    small = lab.folder / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={free_bytes + 8 * MIB}", "tmpfs", str(small)], check=True)
    try:
        subprocess.run(["cp", "-a", str(target), str(small)], check=True)
        lab.catalog = Catalog(small / "backups", "lab")
        with pytest.raises(BackupFailed, match="nothing was frozen"):
            await lab.make(incremental=True)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("ballast.host.storage.backup._free_bytes", lambda _folder: 1 << 40)  # it fills up later
            with pytest.raises(BackupFailed, match="target cannot be written"):
                await lab.make(incremental=True)
        lab.assert_nothing_left()
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)
    lab.catalog = Catalog(target, "lab")
    made = await lab.make(incremental=True)
    assert made.kind == "incremental"
    lab.assert_right(made)


async def test_an_interrupted_backup_leaves_nothing_and_the_next_increment_is_right(lab: Lab) -> None:
    await lab.make(incremental=False)
    for delay_s in itertools.count(step=0.04):  # from the first step to the last, however fast this machine is
        work = asyncio.ensure_future(lab.make(incremental=True))
        await asyncio.wait({work}, timeout=delay_s)
        if not work.cancel():
            lab.assert_right(await work)
            break
        with contextlib.suppress(asyncio.CancelledError):
            await work
        lab.assert_nothing_left()
        lab.machine.scribble(3)
    made = await lab.make(incremental=True)
    assert made.kind == "incremental"
    lab.assert_right(made)


async def test_an_interruption_while_it_cleans_up_leaves_nothing_either(lab: Lab) -> None:
    work = asyncio.ensure_future(lab.make(incremental=False))
    lab.before_finish = work.cancel
    with pytest.raises(asyncio.CancelledError):
        await work
    lab.assert_nothing_left()
    assert len(lab.catalog.backups()) == 1


async def test_what_is_restored_is_what_was_held_and_nothing_is_overwritten(lab: Lab, tmp_path: Path) -> None:
    made = [await lab.make(incremental=incremental) for incremental in (False, True)][-1]
    chain, place, bar = lab.catalog.chain(made.id), lab.catalog.folder, lab.teller().bar
    assert await verify(place, chain, key_file=None, bar=bar) == []
    common: dict[str, Any] = {"disks": None, "key_file": None, "bar": bar}
    paths = await restore(place, chain, tmp_path / "out", format_="raw", overwrite=False, **common)
    assert {path.stem: path.read_bytes() for path in paths} == lab.held[made.id]
    with pytest.raises(BadRequest, match="is there already"):
        await restore(place, chain, tmp_path / "out", format_="raw", overwrite=False, **common)
    with pytest.raises(Busy, match="in use"):
        await restore(place, chain, tmp_path, format_="qcow2", overwrite=True, **common)


async def test_damage_is_found(lab: Lab) -> None:
    made = await lab.make(incremental=False)
    image = lab.catalog.folder / made.id / "root.qcow2"
    with image.open("r+b") as file:
        file.seek(image.stat().st_size // 2)
        file.write(b"damage")
    (found,) = await verify(lab.catalog.folder, [made], key_file=None, bar=lab.teller().bar)
    assert found == f"{image}: its checksum is not the one it had when it was made"


@pytest.mark.parametrize("keep", [Keep(last=1), Keep(last=2)])
async def test_what_is_pruned_takes_nothing_from_what_stays(lab: Lab, keep: Keep) -> None:
    made = [await lab.make(incremental=bool(number)) for number in range(4)]
    todo, teller = plan_prune(lab.catalog, keep), lab.teller()
    await prune(lab.catalog, todo, key_file=None, bar=teller.bar, working=teller.working)
    left = lab.catalog.backups()
    assert [one.id for one in left] == [one.id for one in made[-keep.last :]]
    following = await lab.make(incremental=True)
    assert following.base == made[-1].id
    for one in (*left, following):
        lab.assert_right(one)


async def test_encrypted_images_hold_the_same_and_are_of_no_use_without_the_key(tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("correct horse battery staple")
    for name, backing in (("a", None), ("b", "a.qcow2")):
        await images.create(tmp_path / f"{name}.qcow2", MIB, backing=backing, key_file=key)
    out: dict[str, Any] = {"format_": "raw", "depth": 2, "advance": lambda _share: None}
    with pytest.raises(BackupFailed):
        await images.convert(tmp_path / "b.qcow2", tmp_path / "out", key_file=None, **out)
    await images.convert(tmp_path / "b.qcow2", tmp_path / "out", key_file=key, **out)
    assert (tmp_path / "out").read_bytes() == bytes(MIB)
