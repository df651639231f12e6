"""Points in time of a real libvirt, whose guest is this test: what is served equals what the disks held at the cut."""

import asyncio
import json
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest

from ballast.host.storage.backup import LiveBackup, Order, Teller
from ballast.host.storage.catalog import Catalog
from ballast.host.storage.libvirt_source import LibvirtSource
from ballast.host.storage.shape import read_shape
from ballast.host.storage.source import BackupFailed
from ballast.host.window import FreezePlan
from ballast.wire.errors import Busy
from tests.kernel.point_in_time import back_up, read
from tests.lab.libvirt import LibvirtMachine, define, libvirt_daemon

MIB = 1 << 20
SIZES = {"vda": 24 * MIB, "vdb": 12 * MIB + 512}
SMALL_BYTES = 64 * MIB
IDS = [f"20261123T18000{number}Z-000000" for number in range(9)]
Define = Callable[..., LibvirtMachine]


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    """A folder that QEMU's user may enter; in it a small file system that libvirtd sees, too."""
    with tempfile.TemporaryDirectory(prefix="ballast-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        (small := folder / "small").mkdir()
        size = f"size={SMALL_BYTES},mode=755"
        subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(small)], check=True)
        try:
            yield folder
        finally:
            subprocess.run(["umount", "-l", str(small)], check=True)


@pytest.fixture(scope="module")
def uri(place: Path) -> Iterator[str]:
    with libvirt_daemon(place / "libvirt") as uri:
        yield uri


@pytest.fixture
def folder(place: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=place) as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.fixture
def defined(place: Path, uri: str, folder: Path) -> Iterator[Define]:
    made: list[LibvirtMachine] = []

    def make(*names: str) -> LibvirtMachine:
        images = {name.partition(".")[0]: folder / f"{name}" for name in names}
        sizes = {target: SIZES[target] for target in images}
        for target, path in images.items():
            format_ = path.suffix.removeprefix(".")
            subprocess.run(["qemu-img", "create", "-q", "-f", format_, str(path), str(sizes[target])], check=True)
        machine = define(uri, place / "libvirt", images, sizes)
        made.append(machine)
        machine.start()
        machine.scribble(10)
        return machine

    yield make
    for machine in made:
        machine.remove()


@pytest.fixture
def machine(defined: Define) -> LibvirtMachine:
    return defined("vda.qcow2", "vdb.qcow2")


def start_again(machine: LibvirtMachine) -> None:
    """Start after a crash, which may have taken what was written and never flushed."""
    machine.start()
    for name, size in SIZES.items():
        machine.write(name, 0, size)
    machine.scribble(5)


def source_of(machine: LibvirtMachine, folder: Path) -> LibvirtSource:
    return LibvirtSource(machine.target, folder / "fleece" / "vm")


def assert_clean(machine: LibvirtMachine, folder: Path, last: str | None) -> None:
    assert not machine.has_job()
    assert machine.checkpoints() == ([f"ballast-{last}"] if last else [])
    assert not (folder / "fleece" / "vm").exists()
    nodes = json.loads(machine.ask('{"execute": "query-named-block-nodes"}'))["return"]
    names = sorted(one["name"] for node in nodes for one in node.get("dirty-bitmaps", ()))
    assert names == ([f"ballast-{last}"] * len(machine.images) if last else [])


async def test_a_full_backup_and_three_increments_equal_what_was_held(machine: LibvirtMachine, folder: Path) -> None:
    got: dict[str, bytes] | None = None
    for number in range(4):
        source = source_of(machine, folder)
        base = IDS[number - 1] if number else None
        held, got = await back_up(source, machine, IDS[number], base, got)
        assert got == held
        machine.scribble(5)
        await source.finish(keep=True)
        assert_clean(machine, folder, IDS[number])
        machine.scribble(5)


async def test_an_increment_after_one_that_failed_misses_nothing(machine: LibvirtMachine, folder: Path) -> None:
    first = source_of(machine, folder)
    _, full = await back_up(first, machine, IDS[0], None)
    await first.finish(keep=True)
    for number in (1, 2):
        failed = source_of(machine, folder)
        await back_up(failed, machine, IDS[number], IDS[0], full)
        machine.scribble(5)
        await failed.finish(keep=False)
        assert_clean(machine, folder, IDS[0])
        machine.scribble(5)
    held, got = await back_up(source_of(machine, folder), machine, IDS[3], IDS[0], full)
    assert got == held


@pytest.mark.parametrize("steps", range(1, 5))
async def test_what_a_killed_backup_left_is_repaired(machine: LibvirtMachine, folder: Path, steps: int) -> None:
    first = source_of(machine, folder)
    _, full = await back_up(first, machine, IDS[0], None)
    await first.finish(keep=True)
    machine.scribble(5)
    dead = source_of(machine, folder)
    calls = [dead.survey(IDS[0]), dead.prepare(IDS[1], IDS[0]), dead.cut(), dead.exports()]
    for number, call in enumerate(calls):
        if number < steps:
            await call
            machine.scribble(5)
        else:
            call.close()
    await dead._domain.close()  # as the kernel does for a process that is killed
    fresh = source_of(machine, folder)
    said = await fresh.repair(IDS[0])
    assert bool(said) == (steps > 2)
    assert_clean(machine, folder, IDS[0])
    held, got = await back_up(fresh, machine, IDS[2], IDS[0], full)
    assert got == held
    await fresh.finish(keep=True)
    assert_clean(machine, folder, IDS[2])
    assert await fresh.repair(IDS[2]) == []


async def test_a_backup_that_was_catalogued_but_not_finished_is_the_last(machine: LibvirtMachine, folder: Path) -> None:
    first = source_of(machine, folder)
    _, full = await back_up(first, machine, IDS[0], None)
    await first.finish(keep=True)
    dead = source_of(machine, folder)
    _, onto = await back_up(dead, machine, IDS[1], IDS[0], full)
    machine.scribble(5)
    fresh = source_of(machine, folder)
    assert await fresh.repair(IDS[1])
    assert_clean(machine, folder, IDS[1])
    held, got = await back_up(fresh, machine, IDS[2], IDS[1], onto)
    assert got == held
    await dead._domain.close()


async def test_notes_survive_a_shutdown_and_are_refused_after_a_crash(machine: LibvirtMachine, folder: Path) -> None:
    first = source_of(machine, folder)
    _, full = await back_up(first, machine, IDS[0], None)
    await first.finish(keep=True)
    machine.scribble(5)
    machine.quit()
    with pytest.raises(BackupFailed, match="does not run"):
        await source_of(machine, folder).survey(IDS[0])
    machine.start()
    machine.scribble(5)
    second = source_of(machine, folder)
    held, got = await back_up(second, machine, IDS[1], IDS[0], full)
    assert got == held
    await second.finish(keep=True)
    machine.crash()
    start_again(machine)
    third = source_of(machine, folder)
    disks = await third.survey(IDS[1])
    assert all(disk.changed_bytes is None and "not whole" in (disk.why_full or "") for disk in disks)
    held, got = await back_up(third, machine, IDS[2], None)
    assert got == held
    await third.finish(keep=True)
    assert_clean(machine, folder, IDS[2])


async def test_after_a_crash_in_the_middle_the_next_one_is_full(machine: LibvirtMachine, folder: Path) -> None:
    first = source_of(machine, folder)
    await back_up(first, machine, IDS[0], None)
    await first.finish(keep=True)
    machine.quit()
    machine.start()
    dead = source_of(machine, folder)
    await back_up(dead, machine, IDS[1], IDS[0], {name: bytes(size) for name, size in SIZES.items()})
    machine.crash()
    with pytest.raises(Exception, match="only while"):
        await dead.finish(keep=False)
    start_again(machine)
    fresh = source_of(machine, folder)
    assert "full one" in " ".join(await fresh.repair(IDS[0]))
    assert_clean(machine, folder, None)
    assert all(disk.why_full for disk in await fresh.survey(IDS[0]))
    held, got = await back_up(fresh, machine, IDS[2], None)
    assert got == held


async def test_with_a_raw_disk_every_backup_is_full(defined: Define, folder: Path) -> None:
    machine = defined("vda.qcow2", "vdb.raw")
    first = source_of(machine, folder)
    held, got = await back_up(first, machine, IDS[0], None)
    assert got == held
    await first.finish(keep=True)
    assert_clean(machine, folder, None)
    _, raw = await source_of(machine, folder).survey(IDS[0])
    assert "only in qcow2" in (raw.why_full or "")


async def test_a_disk_that_was_added_makes_the_next_one_full(machine: LibvirtMachine, folder: Path) -> None:
    first = source_of(machine, folder)
    await back_up(first, machine, IDS[0], None)
    await first.finish(keep=True)
    image = folder / "vdc.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(image), "8M"], check=True)
    machine.domain.attachDevice(
        f"<disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='{image}'/>"
        "<target dev='vdc' bus='virtio'/></disk>"
    )
    disks = {disk.name: disk for disk in await source_of(machine, folder).survey(IDS[0])}
    assert disks["vda"].why_full is None
    assert disks["vda"].changed_bytes is not None
    assert "added later" in (disks["vdc"].why_full or "")


async def test_a_scratch_folder_that_runs_full_fails_no_write(machine: LibvirtMachine, place: Path) -> None:
    small = place / "small"
    source = LibvirtSource(machine.target, small / "vm")
    for name, size in SIZES.items():
        machine.write(name, 0, size)  # zeroes would take no room
    held = machine.snapshot()
    await source.survey(None)
    await source.prepare(IDS[0], None)
    filler = ["dd", "if=/dev/zero", f"of={small / 'filler'}", "bs=1M", "status=none"]
    assert "No space left" in subprocess.run(filler, check=False, capture_output=True, text=True).stderr
    await source.cut()
    for name, size in SIZES.items():
        machine.write(name, 0, size)
    got = {export.disk: await asyncio.to_thread(read, export, None) for export in await source.exports()}
    assert got == held
    await source.finish(keep=False)
    with (small / "another").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, 20 * MIB)
    with pytest.raises(BackupFailed, match="which the guest may overwrite"):
        await source.prepare(IDS[1], None)
    await source.finish(keep=False)
    assert machine.checkpoints() == []
    assert not (small / "vm").exists()


async def test_a_backup_of_somebody_elses_is_left_alone(machine: LibvirtMachine, folder: Path) -> None:
    (theirs := folder / "theirs").mkdir()
    theirs.chmod(0o777)
    machine.domain.backupBegin(
        f"<domainbackup mode='pull'><server transport='unix' socket='{theirs}/nbd'/><disks>"
        f"<disk name='vda' type='file'><scratch file='{theirs}/vda'/></disk></disks></domainbackup>",
        "<domaincheckpoint><name>theirs</name></domaincheckpoint>",
        0,
    )
    source = source_of(machine, folder)
    await source.survey(None)
    with pytest.raises(Busy, match="not ours"):
        await source.prepare(IDS[0], None)
    await source.finish(keep=False)
    assert await source.repair(None) == []
    assert machine.has_job()
    machine.domain.abortJob()
    assert machine.checkpoints() == ["theirs"]


async def test_what_a_machine_needs_is_described(machine: LibvirtMachine, folder: Path) -> None:
    source = source_of(machine, folder)
    (told := folder / "machine").mkdir()
    await source.describe(told)
    assert sorted(path.name for path in told.iterdir()) == ["domain-inactive.xml", "domain.xml", "shape.json"]
    shape = read_shape(told)
    assert shape.machine_type.startswith("pc-q35-")
    assert {disk.name: disk.bus for disk in shape.disks} == dict.fromkeys(machine.held, "virtio")
    assert "machine='pc-q35-" in (told / "domain.xml").read_text()
    await source.finish(keep=False)


async def test_a_machine_that_is_not_there_is_told(uri: str, folder: Path) -> None:
    with pytest.raises(BackupFailed, match="nobody: libvirt: Domain not found"):
        await LibvirtSource(f"{uri}/nobody", folder / "vm").survey(None)


async def test_whole_backups_are_right(machine: LibvirtMachine, folder: Path) -> None:
    held: dict[str, bytes] = {}

    class Source(LibvirtSource):
        async def cut(self) -> None:
            nonlocal held
            machine.scribble(3)
            await super().cut()
            held = machine.snapshot()
            machine.scribble(10)

    said: list[str] = []
    quiet = Teller(said.append, lambda _what: nullcontext(), lambda _what, _total: nullcontext(lambda _bytes: None))
    catalog = Catalog(folder / "backups", "lab")
    for number in range(3):
        source = Source(machine.target, folder / "fleece" / "vm")
        order = Order("none", True, FreezePlan(), "retry", "libvirt", folder / "fleece")
        made = await LiveBackup(source, catalog, order, quiet).make(None, None)  # type: ignore[arg-type]  # nothing is frozen
        assert (made.kind, said) == ("incremental" if number else "full", [])
        for image in made.images:
            raw = folder / "restored.raw"
            path = catalog.folder / made.id / image.file
            subprocess.run(["qemu-img", "convert", "-O", "raw", str(path), str(raw)], check=True)
            assert raw.read_bytes()[: image.bytes] == held[image.disk]
        assert (catalog.folder / made.id / "machine" / "domain.xml").is_file()
        assert_clean(machine, folder, made.id)
