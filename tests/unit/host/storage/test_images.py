"""Images through the real qemu-img and qemu-nbd: what is asked of them, and what becomes of those that fail."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from ballast.host.storage import images
from ballast.host.storage.copy import copy
from ballast.host.storage.source import BackupFailed, Export
from tests.unit.host.storage.disks import MIB, TIMEOUT_S, nbd_server, patchwork, read_all, run, write_sparse

# Each would be a protocol, an option or a list of them, if it were not said to be a file.
SIZE_BYTES = 3 * MIB + 512
CLUSTER_BYTES = 65536
HOSTILE = ["-o", "nbd:host", "a,b=c", "json:{}", "with space", "%41"]


def silent(_share: float) -> None:
    """Nobody looks at the progress."""


async def write(image: Path, writes: str, *, key_file: Path | None = None, depth: int = 1) -> None:
    """Write to an image as a backup does, through its NBD server: ``VALUE OFFSET BYTES; …``."""
    import nbd

    def do(socket: Path) -> None:
        client = nbd.NBD()
        client.connect_unix(str(socket))
        for words in writes.split(";"):
            value, offset, bytes_ = map(int, words.split())
            client.pwrite(bytes([value]) * bytes_, offset)
        client.flush()
        client.shutdown()

    async with images.serve(image, key_file=key_file, depth=depth) as socket:
        await asyncio.to_thread(do, socket)


@dataclass(frozen=True)
class Locked:
    """Encrypted images with nothing in them: a full one, and one for a folder in which ``base`` leads to its base."""

    key: Path
    full: Path
    based: Path


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Locked:
    """Made once, and with little work for an attacker: ours have so much that each look at one takes seconds."""
    folder = tmp_path_factory.mktemp("locked")
    made = Locked(folder / "key,id=other", folder / "full", folder / "based")
    made.key.write_text("secret")
    secret = ("--object", f"secret,id=key,file={folder}/key,,id=other")
    options = "encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=10"
    run("qemu-img", "create", "-q", "-f", "qcow2", *secret, "-o", options, made.full, str(SIZE_BYTES))
    shutil.copy(made.full, made.based)
    image = f"driver=qcow2,encrypt.key-secret=key,file.filename={made.based}"
    run("qemu-img", "rebase", "-u", *secret, "-b", "base/disk.qcow2", "-F", "qcow2", "--image-opts", image)
    return made


async def make(path: Path, base: Path | None, locked: Locked | None) -> Path:
    """Make an image, in a folder of its own."""
    path.parent.mkdir()
    if base:
        (path.parent / "base").symlink_to(f"../{base.parent.name}")
    if locked:
        shutil.copy(locked.based if base else locked.full, path)
    else:
        await images.create(path, SIZE_BYTES, backing="base/disk.qcow2" if base else None)
    return path


async def chain(folder: Path, locked: Locked | None = None) -> list[Path]:
    """A full image and two that are based on it, one after the other, with what an increment has: data and zeroes."""
    made: list[Path] = []
    for depth, writes in enumerate(("1 0 1999872; 2 2097152 512", "3 512 69632; 0 1048576 131072", "4 65536 512"), 1):
        path = await make(folder / str(depth) / "disk.qcow2", made[-1] if made else None, locked)
        await write(path, writes, key_file=locked.key if locked else None, depth=depth)
        made.append(path)
    return made


def expected(depth: int) -> bytes:
    """What the images of ``chain`` hold."""
    content = bytearray(SIZE_BYTES)
    content[:1999872] = b"\1" * 1999872
    content[2097152 : 2097152 + 512] = b"\2" * 512
    if depth > 1:
        content[512 : 512 + 69632] = b"\3" * 69632
        content[MIB : MIB + 131072] = bytes(131072)
    if depth > 2:
        content[65536 : 65536 + 512] = b"\4" * 512
    return bytes(content)


@pytest.mark.parametrize("name", HOSTILE)
async def test_any_name_is_a_file(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / name
    folder.mkdir()
    base, path, out = Path(name, f"{name}.qcow2"), folder / "new", Path(name, f"{name}.raw")
    await images.create(base, MIB)
    await images.create(path, MIB, backing=f"../{name}/{base.name}")
    await write(path, "5 0 512")
    assert (await images.read_info(path)).backing == f"../{name}/{base.name}"
    assert await images.check(path) is None
    await images.convert(path, out, format_="raw", depth=2, advance=silent)
    assert out.read_bytes() == b"\5" * 512 + bytes(MIB - 512)


@pytest.mark.parametrize("bytes_", [512, 1000, 64 * 1024 + 512, 1 << 40])
async def test_an_image_is_as_large_as_its_disk_and_takes_no_room(tmp_path: Path, bytes_: int) -> None:
    await images.create(tmp_path / "disk", bytes_)
    info = await images.read_info(tmp_path / "disk")
    assert (info.format, info.backing, info.is_encrypted) == ("qcow2", None, False)
    assert bytes_ <= info.bytes < bytes_ + 512
    assert info.used_bytes < MIB


@pytest.mark.parametrize("is_encrypted", [False, True])
@pytest.mark.parametrize("format_", ["raw", "qcow2"])
async def test_what_is_made_of_a_chain_is_whole_by_itself(
    tmp_path: Path, locked: Locked, format_: images.Format, is_encrypted: bool
) -> None:
    key_file = locked.key if is_encrypted else None
    made, told = await chain(tmp_path, locked if is_encrypted else None), list[float]()
    out = tmp_path / "out"
    await images.convert(made[-1], out, format_=format_, depth=3, key_file=key_file, advance=told.append)
    for path in made:
        shutil.rmtree(path.parent)
    seen = out.read_bytes() if format_ == "raw" else read_all(out, tmp_path)
    assert seen == expected(3)
    assert told == sorted(told)
    assert told[-1] == 1


async def test_what_is_encrypted_cannot_be_read_in_the_image(tmp_path: Path, locked: Locked) -> None:
    marker = b"what nobody may read"
    source = write_sparse(tmp_path / "raw", marker * 5000)
    image = Path(shutil.copy(locked.full, tmp_path / "image"))
    with nbd_server(tmp_path / "socket", "-r", "-f", "raw", source):
        async with images.serve(image, key_file=locked.key) as socket:
            await copy(Export("vda", tmp_path / "socket", ""), socket)
    await images.convert(image, tmp_path / "out", format_="raw", depth=1, key_file=locked.key, advance=silent)
    assert (tmp_path / "out").read_bytes().startswith(marker * 5000)
    assert (await images.read_info(image)).is_encrypted
    assert marker not in image.read_bytes()
    (tmp_path / "wrong").write_text("guess")
    said = await images.check(image, key_file=tmp_path / "wrong")
    assert said is not None
    assert "Invalid password" in said


@pytest.mark.parametrize("onto", [None, "../1/disk.qcow2"])
async def test_an_image_takes_in_what_it_was_based_on(tmp_path: Path, onto: str | None) -> None:
    made = await chain(tmp_path)
    await images.rebase(made[2], onto, silent)
    shutil.rmtree(made[1].parent)
    if onto is None:
        shutil.rmtree(made[0].parent)
    assert (await images.read_info(made[2])).backing == onto
    assert read_all(made[2], tmp_path) == expected(3)
    assert await images.check(made[2], depth=2) is None


@pytest.mark.parametrize("is_full", [False, True])
async def test_an_encrypted_image_is_written_anew_onto_another(tmp_path: Path, locked: Locked, is_full: bool) -> None:
    made = await chain(tmp_path, locked)
    new = await make(tmp_path / "new" / "disk.qcow2", None if is_full else made[0], locked)
    depth = 1 if is_full else 2
    await images.rewrite(made[2], 3, new, to_depth=depth, key_file=locked.key, advance=silent)
    shutil.rmtree(made[1].parent)
    await images.convert(new, tmp_path / "out", format_="raw", depth=depth, key_file=locked.key, advance=silent)
    assert (tmp_path / "out").read_bytes() == expected(3)


def leak(path: Path) -> None:
    """Have it count one more cluster, which nobody uses: the third one holds what it counts, in 16 bits each."""
    number = path.stat().st_size // CLUSTER_BYTES
    with path.open("r+b") as file:
        file.seek(2 * CLUSTER_BYTES + 2 * number + 1)
        file.write(b"\1")
        file.truncate((number + 1) * CLUSTER_BYTES)


def corrupt(path: Path) -> None:
    """Point its first table of clusters to where none is."""
    with path.open("r+b") as file:
        file.seek(40)
        table = int.from_bytes(file.read(8), "big")
        file.seek(table)
        file.write((0x80000000_00000000 | 7 * CLUSTER_BYTES + 512).to_bytes(8, "big"))


@pytest.mark.parametrize(("damage", "said"), [(leak, "1 leaks"), (corrupt, "corruptions")])
async def test_damage_is_told(tmp_path: Path, damage: Callable[[Path], None], said: str) -> None:
    await images.create(tmp_path / "disk", MIB)
    await write(tmp_path / "disk", "1 0 1000")
    damage(tmp_path / "disk")
    told = await images.check(tmp_path / "disk")
    assert told is not None
    assert said in told


async def test_what_is_no_image_is_told(tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(patchwork(MIB))
    assert "not in qcow2 format" in (await images.check(tmp_path / "disk") or "")
    for ask in (
        images.read_info(tmp_path / "none"),
        images.convert(tmp_path / "disk", tmp_path / "out", format_="raw", depth=1, advance=silent),
    ):
        with pytest.raises(BackupFailed, match=str(tmp_path)):
            await ask
    with pytest.raises(BackupFailed, match="not in qcow2 format"):
        async with images.serve(tmp_path / "disk"):
            pass


@pytest.mark.parametrize("hangs", [False, True])
async def test_a_writer_does_not_outlive_who_fails(tmp_path: Path, hangs: bool) -> None:
    await images.create(tmp_path / "disk", MIB)
    socket, pid = tmp_path, 0
    with suppress(ZeroDivisionError):
        async with images.serve(tmp_path / "disk") as socket:
            pid = int(socket.with_name("pid").read_text())
            assert socket.parent.stat().st_mode & 0o077 == 0
            if hangs:
                os.kill(pid, signal.SIGSTOP)
            raise ZeroDivisionError
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert not socket.parent.exists()
    assert not await images.is_in_use(tmp_path / "disk", "qcow2")


async def test_an_image_that_is_written_is_in_use(tmp_path: Path) -> None:
    await images.create(tmp_path / "disk", MIB)
    with nbd_server(tmp_path / "socket", "-f", "qcow2", tmp_path / "disk"):
        assert await images.is_in_use(tmp_path / "disk", "qcow2")
    assert not await images.is_in_use(tmp_path / "disk", "qcow2")


async def test_a_conversion_that_is_cancelled_leaves_no_program(tmp_path: Path) -> None:
    run("qemu-img", "create", "-q", "-f", "qcow2", tmp_path / "disk", "64M")
    run("qemu-io", "-c", "write -P 1 0 64M", "-f", "qcow2", tmp_path / "disk")
    (begun := asyncio.Event()).clear()
    work = asyncio.ensure_future(
        images.convert(
            tmp_path / "disk", tmp_path / "out", format_="qcow2", depth=1, advance=lambda _share: begun.set()
        )
    )
    async with asyncio.timeout(TIMEOUT_S):
        await begun.wait()
        work.cancel()
        with pytest.raises(asyncio.CancelledError):
            await work
    assert not await images.is_in_use(tmp_path / "out", "qcow2")
