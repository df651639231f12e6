"""Copying a disk between two real NBD servers: what arrives, and what becomes of one that does not answer."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import pytest

from ballast.host.storage import images
from ballast.host.storage.copy import copy
from ballast.host.storage.source import BackupFailed, Export

SIZE = (3 << 20) + 512
TIMEOUT_S = 30.0


@contextmanager
def served(image: Path, *words: str) -> Iterator[Export]:
    """A disk as a machine would serve it."""
    socket = image.with_suffix(".nbd")
    argv = ["qemu-nbd", "-r", "-x", "disk", "-k", str(socket), "-t", *words, str(image)]
    process = subprocess.Popen(["setpriv", "--pdeathsig", "KILL", "--", *argv])
    try:
        while not socket.exists():
            assert process.poll() is None
        yield Export("disk", socket, "disk")
    finally:
        process.kill()
        process.wait()


@asynccontextmanager
async def target(
    path: Path, bytes_: int = SIZE, backing: str | None = None, *, is_stopped: bool = False
) -> AsyncIterator[Path]:
    """An image to copy to."""
    await images.create(path, bytes_, backing=backing)
    async with images.serve(path) as socket:
        if is_stopped:
            os.kill(writer(socket), signal.SIGSTOP)
        yield socket


def noise(path: Path, bytes_: int = SIZE) -> bytes:
    """A disk with data and holes."""
    dice = random.Random(0)
    content = bytearray(bytes_)
    for offset in range(0, bytes_, 512 << 10):
        piece = dice.randbytes(200 << 10)[: bytes_ - offset]
        content[offset : offset + len(piece)] = piece
    path.write_bytes(content)
    subprocess.run(["fallocate", "--dig-holes", str(path)], check=True)
    return bytes(content)


def held(path: Path) -> bytes:
    """What an image holds."""
    raw = path.with_suffix(".out")
    subprocess.run(["qemu-img", "convert", "-O", "raw", str(path), str(raw)], check=True)
    return raw.read_bytes()


async def test_a_copy_is_equal_and_takes_no_holes(tmp_path: Path) -> None:
    content = noise(tmp_path / "disk.raw")
    told: list[int] = []
    with served(tmp_path / "disk.raw", "-f", "raw") as export:
        async with target(tmp_path / "copy.qcow2") as socket:
            copied = await copy(export, socket, advance=told.append)
    assert held(tmp_path / "copy.qcow2") == content
    assert copied == sum(told) < len(content)


async def test_an_increment_is_what_its_bitmap_marks(tmp_path: Path) -> None:
    disk, old = tmp_path / "disk.qcow2", tmp_path / "old.qcow2"
    noise(tmp_path / "disk.raw", 4 << 20)
    for path in (disk, old):
        subprocess.run(["qemu-img", "convert", "-O", "qcow2", str(tmp_path / "disk.raw"), str(path)], check=True)
    subprocess.run(["qemu-img", "bitmap", "--add", "-g", "65536", str(disk), "since"], check=True)
    commands = ("write -P 7 100k 10k", "write -z 1M 128k", "write -P 9 4080k 6k")
    subprocess.run(["qemu-io", *(word for one in commands for word in ("-c", one)), str(disk)], check=True)
    with served(disk, "-f", "qcow2", "-B", "since") as export:
        marked = Export("disk", export.socket, export.name, "qemu:dirty-bitmap:since")
        async with target(tmp_path / "new.qcow2", 4 << 20, "old.qcow2") as socket:
            copied = await copy(marked, socket)
    assert held(tmp_path / "new.qcow2") == held(disk)
    assert copied == (1 + 2 + 1) * (64 << 10)


async def test_a_target_that_hangs_ends_the_copy_and_names_it(tmp_path: Path) -> None:
    noise(tmp_path / "disk.raw")
    with (
        served(tmp_path / "disk.raw", "-f", "raw") as export,
        pytest.raises(BackupFailed, match="the target has not answered for 1 s"),
    ):
        async with asyncio.timeout(TIMEOUT_S), target(tmp_path / "copy.qcow2", is_stopped=True) as socket:
            await copy(export, socket, stall_s=1)


async def test_a_copy_that_is_cancelled_ends_at_once_also_while_the_target_hangs(tmp_path: Path) -> None:
    noise(tmp_path / "disk.raw")
    with served(tmp_path / "disk.raw", "-f", "raw") as export, pytest.raises(TimeoutError):
        async with asyncio.timeout(1), target(tmp_path / "copy.qcow2", is_stopped=True) as socket:
            await copy(export, socket)


async def test_a_target_that_is_slow_for_a_while_loses_nothing(tmp_path: Path) -> None:
    content = noise(tmp_path / "disk.raw")
    with served(tmp_path / "disk.raw", "-f", "raw") as export:
        async with asyncio.timeout(TIMEOUT_S), target(tmp_path / "copy.qcow2") as socket:
            pid = writer(socket)
            os.kill(pid, signal.SIGSTOP)
            asyncio.get_running_loop().call_later(1, os.kill, pid, signal.SIGCONT)
            await copy(export, socket)
    assert held(tmp_path / "copy.qcow2") == content


async def test_a_source_that_dies_is_told_from_a_target(tmp_path: Path) -> None:
    noise(tmp_path / "disk.raw")
    with served(tmp_path / "disk.raw", "-f", "raw") as export:
        pass
    with pytest.raises(BackupFailed, match="no NBD"):
        async with target(tmp_path / "copy.qcow2") as socket:
            await copy(export, socket)


async def test_a_copy_is_no_faster_than_it_may_be(tmp_path: Path) -> None:
    noise(tmp_path / "disk.raw")
    clock = asyncio.get_running_loop().time
    with served(tmp_path / "disk.raw", "-f", "raw") as export:
        async with target(tmp_path / "copy.qcow2") as socket:
            started_s = clock()
            copied = await copy(export, socket, rate_bytes_s=1 << 20)
            assert clock() - started_s > 0.8 * copied / (1 << 20) - 0.2


def writer(socket: Path) -> int:
    """The process that serves an image."""
    return int(socket.with_name("pid").read_text())
