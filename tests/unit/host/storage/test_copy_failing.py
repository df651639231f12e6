"""A copy of which one end fails, hangs or dies says which, and waits for neither in vain. Disks of odd sizes."""

from __future__ import annotations

import asyncio
import signal
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from ballast.host.storage.copy import copy
from ballast.host.storage.source import BackupFailed, Export
from tests.unit.host.storage.disks import MIB, TIMEOUT_S, nbd_server, patchwork, read_all, run, write_sparse


class Ends:
    """Both ends of a copy."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder = folder
        self.target_image = folder / "target.qcow2"
        self.target = folder / "target.sock"
        self._stack = stack

    def serve_raw(self, content: bytes) -> tuple[Export, subprocess.Popen[bytes]]:
        path = write_sparse(self.folder / "source.raw", content)
        return self.serve("-r", "-f", "raw", path)

    def serve(self, *words: str | Path, bitmap: str | None = None) -> tuple[Export, subprocess.Popen[bytes]]:
        socket = self.folder / "source.sock"
        server = self._stack.enter_context(nbd_server(socket, "-x", "vda", *words))
        return Export("vda", socket, "vda", bitmap), server

    def serve_target(self, bytes_: int, limit_bytes: int | None = None) -> subprocess.Popen[bytes]:
        run("qemu-img", "create", "-q", "-f", "qcow2", self.target_image, str(bytes_))
        words = ("--discard=unmap", "-f", "qcow2", self.target_image)
        return self._stack.enter_context(nbd_server(self.target, *words, limit_bytes=limit_bytes))


@pytest.fixture
def ends(tmp_path: Path) -> Iterator[Ends]:
    with ExitStack() as stack:
        yield Ends(tmp_path, stack)


@pytest.mark.parametrize("bytes_", [512, 64 * 1024 + 512, 5 * MIB + 1000])
async def test_a_disk_of_any_size_is_equal_and_what_is_zero_is_not_written(ends: Ends, bytes_: int) -> None:
    content = patchwork(bytes_ // 2) + bytes(bytes_ - bytes_ // 2)
    export, _ = ends.serve_raw(content)
    target = ends.serve_target(bytes_)
    copied_bytes = await copy(export, ends.target)
    target.wait(TIMEOUT_S)
    seen = read_all(ends.target_image, ends.folder)
    assert seen == content + bytes(len(seen) - len(content))
    assert 0 <= len(seen) - len(content) < 512
    assert copied_bytes <= bytes_ // 2 + 4096


async def test_a_target_that_is_full_is_named(ends: Ends) -> None:
    export, _ = ends.serve_raw(bytes([1]) * 8 * MIB)
    ends.serve_target(8 * MIB, limit_bytes=3 * MIB)
    with pytest.raises(BackupFailed, match=r"the target cannot be written to: .*No space left"):
        await copy(export, ends.target)


async def test_a_target_that_is_full_is_named_also_when_the_machine_hangs(ends: Ends) -> None:
    export, source = ends.serve_raw(bytes([1]) * 64 * MIB)
    ends.serve_target(64 * MIB, limit_bytes=3 * MIB)

    def stop(_bytes: int) -> None:
        source.send_signal(signal.SIGSTOP)

    async with asyncio.timeout(TIMEOUT_S / 2):
        with pytest.raises(BackupFailed, match="the target cannot be written to"):
            await copy(export, ends.target, advance=stop, stall_s=TIMEOUT_S)


async def test_a_machine_that_hangs_is_named(ends: Ends) -> None:
    export, source = ends.serve_raw(bytes([1]) * 32 * MIB)
    ends.serve_target(32 * MIB)

    def stop(_bytes: int) -> None:
        source.send_signal(signal.SIGSTOP)

    with pytest.raises(BackupFailed, match="vda: the machine has not answered for 1 s"):
        await copy(export, ends.target, stall_s=1, advance=stop)


@pytest.mark.parametrize("who", ["source", "target"])
@pytest.mark.parametrize("moment", ["connecting", "copying"])
async def test_it_can_be_cancelled_whoever_hangs(ends: Ends, who: str, moment: str) -> None:
    export, source = ends.serve_raw(bytes([1]) * 32 * MIB)
    stopped = {"source": source, "target": ends.serve_target(32 * MIB)}[who]
    loop, is_hanging = asyncio.get_running_loop(), asyncio.Event()

    def stop(_bytes: int) -> None:
        stopped.send_signal(signal.SIGSTOP)
        loop.call_soon_threadsafe(is_hanging.set)

    if moment == "connecting":
        stop(0)
    work = asyncio.ensure_future(copy(export, ends.target, advance=stop, stall_s=2 * TIMEOUT_S))
    async with asyncio.timeout(TIMEOUT_S):
        await is_hanging.wait()
        await asyncio.sleep(0.1)
        work.cancel()
        with pytest.raises(asyncio.CancelledError):
            await work


async def test_a_source_that_dies_is_named(ends: Ends) -> None:
    export, source = ends.serve_raw(bytes([1]) * 32 * MIB)
    ends.serve_target(32 * MIB)
    with pytest.raises(BackupFailed, match="the machine's disk cannot be read"):
        await copy(export, ends.target, advance=lambda _bytes: source.kill())


async def test_a_target_that_dies_is_named(ends: Ends) -> None:
    export, _ = ends.serve_raw(bytes([1]) * 32 * MIB)
    target = ends.serve_target(32 * MIB)
    with pytest.raises(BackupFailed, match="the target cannot be written to"):
        await copy(export, ends.target, advance=lambda _bytes: target.kill())


# A snapshot that was broken, since its fleece was full, answers so when it is asked where it has data.
@pytest.mark.parametrize(
    ("asked", "errno", "said"),
    [("block-status", 13, "gave the point in time up"), ("read", 5, "disk cannot be read")],
)
async def test_a_machine_that_answers_an_error_is_named(ends: Ends, asked: str, errno: int, said: str) -> None:
    raw = write_sparse(ends.folder / "raw", bytes([1]) * 8 * MIB)
    disk = f"driver=raw,file.driver=blkdebug,file.image.driver=file,file.image.filename={raw}"
    error = {"event": "none", "iotype": asked, "errno": str(errno), "sector": "8192"}
    words = ",".join([disk, *(f"file.inject-error.0.{key}={value}" for key, value in error.items())])
    export, _ = ends.serve("-r", "--image-opts", words)
    ends.serve_target(8 * MIB)
    with pytest.raises(BackupFailed, match=said):
        await copy(export, ends.target)


async def test_what_is_zero_counts_for_no_rate(ends: Ends) -> None:
    bytes_ = 1024 * MIB
    source = ends.folder / "source.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", source, str(bytes_))
    run("qemu-img", "bitmap", "--add", source, "since")
    run("qemu-io", "-c", f"write -z 0 {bytes_}", "-f", "qcow2", source)
    export, _ = ends.serve("-r", "-f", "qcow2", "-B", "since", source, bitmap="qemu:dirty-bitmap:since")
    ends.serve_target(bytes_)
    async with asyncio.timeout(TIMEOUT_S / 2):
        assert await copy(export, ends.target, rate_bytes_s=4 * MIB) == bytes_


async def test_a_bitmap_that_is_not_there_is_never_taken_for_an_empty_one(ends: Ends) -> None:
    export, _ = ends.serve_raw(bytes(MIB))
    ends.serve_target(MIB)
    with pytest.raises(BackupFailed, match="does not tell qemu:dirty-bitmap:since"):
        await copy(Export("vda", export.socket, "vda", "qemu:dirty-bitmap:since"), ends.target)
