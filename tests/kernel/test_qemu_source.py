"""Points in time of a real QEMU, whose guest is this test: what is served equals what the disks held at the cut."""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import nbd
import pytest

from ballast.host.storage.qemu_source import QemuSource
from ballast.host.storage.shape import read_shape
from tests.kernel.point_in_time import back_up, read
from tests.lab.still_machine import StillMachine, still_machine

MIB = 1 << 20
SIZES = {"root": 48 * MIB, "data": 24 * MIB + 512}
IDS = [f"20261123T18000{number}Z-000000" for number in range(9)]


def make_images(folder: Path) -> dict[str, Path]:
    images = {"root": folder / "root.qcow2", "data": folder / "data.qcow2"}
    for name, path in images.items():
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(path), str(SIZES[name])], check=True)
    return images


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tmp_path.chmod(0o755)
    return tmp_path


@pytest.fixture
def machine(folder: Path) -> Iterator[StillMachine]:
    held = {name: bytearray(bytes_) for name, bytes_ in SIZES.items()}
    with still_machine(folder / "qemu", make_images(folder), held) as machine:
        machine.scribble(20)
        yield machine


def source_of(machine: StillMachine, folder: Path) -> QemuSource:
    return QemuSource(str(machine.qmp), folder / "fleece" / "vm", 5)


def assert_clean(machine: StillMachine, folder: Path, last: str | None) -> None:
    assert machine.nodes_of_ours() == []
    assert not (folder / "fleece" / "vm").exists()
    expected = [f"ballast-{last}"] if last else []
    assert all(names == expected for names in machine.bitmaps().values())
    assert len(machine.bitmaps()) == (len(SIZES) if last else 0)


async def test_a_full_backup_and_three_increments_equal_what_was_held(machine: StillMachine, folder: Path) -> None:
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


async def test_an_increment_after_one_that_failed_misses_nothing(machine: StillMachine, folder: Path) -> None:
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
async def test_what_a_killed_backup_left_is_repaired(machine: StillMachine, folder: Path, steps: int) -> None:
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
    await dead._disconnect()  # as the kernel does for a process that is killed
    fresh = source_of(machine, folder)
    said = await fresh.repair(IDS[0])
    assert bool(said) == (steps > 1)
    assert_clean(machine, folder, IDS[0])
    held, got = await back_up(fresh, machine, IDS[2], IDS[0], full)
    assert got == held
    await fresh.finish(keep=True)
    assert_clean(machine, folder, IDS[2])
    assert await fresh.repair(IDS[2]) == []


async def test_a_backup_that_was_catalogued_but_not_finished_is_the_last(machine: StillMachine, folder: Path) -> None:
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


async def test_notes_survive_a_shutdown_and_are_refused_after_a_crash(folder: Path) -> None:
    held = {name: bytearray(bytes_) for name, bytes_ in SIZES.items()}
    images = make_images(folder)
    with still_machine(folder / "qemu", images, held) as machine:
        machine.scribble(10)
        first = source_of(machine, folder)
        _, full = await back_up(first, machine, IDS[0], None)
        await first.finish(keep=True)
        machine.scribble(10)
        machine.quit()
    with still_machine(folder / "qemu", images, held) as machine:
        machine.scribble(10)
        second = source_of(machine, folder)
        was, got = await back_up(second, machine, IDS[1], IDS[0], full)
        assert got == was
        await second.finish(keep=True)
        machine.quit()
    with still_machine(folder / "qemu", images, held) as machine:
        machine.scribble(1)  # and it is killed
    with still_machine(folder / "qemu", images, held) as machine:
        third = source_of(machine, folder)
        disks = await third.survey(IDS[1])
        assert all(disk.changed_bytes is None and "not whole" in (disk.why_full or "") for disk in disks)
        assert await third.repair(IDS[1])
        assert machine.bitmaps() == {}


async def test_a_raw_disk_has_notes_until_qemu_ends(folder: Path) -> None:
    image = folder / "data.raw"
    image.touch()
    os.truncate(image, 8 * MIB)
    held = {"data": bytearray(8 * MIB)}
    with still_machine(folder / "qemu", {"data": image}, held) as machine:
        first = source_of(machine, folder)
        _, full = await back_up(first, machine, IDS[0], None)
        await first.finish(keep=True)
        machine.scribble(5)
        was, got = await back_up(source_of(machine, folder), machine, IDS[1], IDS[0], full)
        assert got == was
        machine.quit()
    with still_machine(folder / "qemu", {"data": image}, held) as machine:
        (disk,) = await source_of(machine, folder).survey(IDS[0])
        assert "only qcow2" in (disk.why_full or "")


async def test_a_full_fleece_breaks_the_snapshot_and_no_write(machine: StillMachine, folder: Path) -> None:
    small = folder / "fleece"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m,mode=755", "tmpfs", str(small)], check=True)
    try:
        source = source_of(machine, folder)
        await source.survey(None)
        await source.prepare(IDS[0], None)
        await source.cut()
        exports = await source.exports()
        machine.write("root", 0, 8 * MIB)
        with pytest.raises(nbd.Error):
            read(exports[0], None)
        machine.scribble(5)
        await source.finish(keep=False)
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)
    assert_clean(machine, folder, None)
    held, got = await back_up(source_of(machine, folder), machine, IDS[1], None)
    assert got == held


async def test_an_nbd_server_of_somebody_elses_is_left_alone(machine: StillMachine, folder: Path) -> None:
    theirs = folder / "theirs"
    machine.ask("nbd-server-start", addr={"type": "unix", "data": {"path": str(theirs)}})
    machine.ask("block-export-add", type="nbd", id="theirs", **{"node-name": "node0"})
    source = source_of(machine, folder)
    await source.survey(None)
    await source.prepare(IDS[0], None)
    await source.cut()
    with pytest.raises(Exception, match="only once"):
        await source.exports()
    await source.finish(keep=False)
    assert_clean(machine, folder, None)
    assert [one["id"] for one in machine.ask("query-block-exports")] == ["theirs"]


@pytest.mark.parametrize("style", ["drive", "node"])
async def test_what_a_machine_needs_is_kept_and_its_firmware_is_no_disk(folder: Path, style: str) -> None:
    code, variables = folder / "code.fd", folder / "vars.fd"
    for path in (code, variables):
        path.write_bytes(path.name.encode().ljust(256 << 10, b"\0"))
    arguments = {
        "drive": [
            *("-drive", f"if=pflash,format=raw,readonly=on,file={code}"),
            *("-drive", f"if=pflash,format=raw,file={variables}"),
        ],
        "node": [
            *("-blockdev", f"driver=raw,node-name=code,read-only=on,file.driver=file,file.filename={code}"),
            *("-blockdev", f"driver=raw,node-name=vars,file.driver=file,file.filename={variables}"),
            *("-machine", "pflash0=code,pflash1=vars"),
        ],
    }[style]
    held = {name: bytearray(bytes_) for name, bytes_ in SIZES.items()}
    with still_machine(folder / "qemu", make_images(folder), held, arguments) as machine:
        source = source_of(machine, folder)
        assert [disk.name for disk in await source.survey(None)] == [*SIZES]
        (told := folder / "machine").mkdir()
        await source.describe(told)
        await source.finish(keep=False)
    assert (told / "firmware-0").read_bytes() == variables.read_bytes()
    assert "qemu-system-x86_64" in json.loads((told / "machine.json").read_text())["command-line"][0]
    shape = read_shape(told)
    assert shape.machine_type.startswith("pc-q35-")
    assert (shape.firmware, shape.is_accelerated, shape.kernel) == (str(code), False, None)
    assert [(disk.name, disk.bus) for disk in shape.disks] == [(name, "virtio") for name in SIZES]
