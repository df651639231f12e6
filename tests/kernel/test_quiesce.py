"""Freezing under a lease on real file systems: agent and guard, without systemd."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ballast.guest.config import Quiesce as Settings
from ballast.guest.quiesce.net import GRACE_S
from ballast.guest.quiesce.session import Quiesce
from ballast.wire.errors import BadRequest, Busy, DeadlineExceeded, KernelFailure, LeaseExpired, NoSuchId
from ballast.wire.names import QuiesceBegun
from tests.kernel.conftest import GuardProcess, LoopFs, MakeLoopFs
from tests.vm.witness import ParkedWriter

MakeQuiesce = Callable[..., Quiesce]


def is_frozen(filesystem: LoopFs) -> bool:
    """Ask fsfreeze(8), which knows no more than the kernel tells: EBUSY means frozen."""
    frozen = subprocess.run(["fsfreeze", "-f", filesystem.path], check=False, capture_output=True, text=True)
    if frozen.returncode == 0:
        subprocess.run(["fsfreeze", "-u", filesystem.path], check=True)
        return False
    assert "busy" in frozen.stderr, frozen.stderr
    return True


class Writer:
    """A process that creates a file and tells when it is done: it blocks while its file system is frozen."""

    def __init__(self, filesystem: LoopFs) -> None:
        self.process = subprocess.Popen(["touch", filesystem.path / f"file{time.monotonic_ns()}"])

    @property
    def is_blocked(self) -> bool:
        """Whether it sleeps uninterruptibly."""
        if self.process.poll() is not None:
            return False
        return Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "D"

    async def wait_blocked(self) -> None:
        """Wait until it sleeps in the kernel."""
        async with asyncio.timeout(10):
            while not self.is_blocked:
                assert self.process.poll() is None, "the writer was not held up"
                await asyncio.sleep(0.01)


async def test_freeze_holds_writers_and_end_lets_them_go(
    make_loop_fs: MakeLoopFs, make_quiesce: MakeQuiesce, guard: GuardProcess
) -> None:
    filesystems = [make_loop_fs(kind) for kind in ("ext4", "xfs", "btrfs")]
    quiesce = make_quiesce(*filesystems)
    begun = await quiesce.begin("a", 30_000)
    assert begun.consistency == "filesystem"
    assert [(one.mountpoint, one.state) for one in begun.filesystems] == [(str(f.path), "frozen") for f in filesystems]
    assert all(is_frozen(filesystem) for filesystem in filesystems)
    assert await quiesce.begin("a", 30_000) == begun
    writers = [Writer(filesystem) for filesystem in filesystems]
    for writer in writers:
        await writer.wait_blocked()
    ended = await quiesce.end("a")
    assert ended.held
    assert ended.reason is None
    assert [one.state for one in ended.filesystems] == ["thawed"] * 3
    for writer in writers:
        assert writer.process.wait(timeout=10) == 0
    assert not any(is_frozen(filesystem) for filesystem in filesystems)
    assert await quiesce.end("a") == ended
    assert quiesce.status().state == "thawed"


async def test_lease_ends_by_itself_and_end_says_so(make_loop_fs: MakeLoopFs, make_quiesce: MakeQuiesce) -> None:
    filesystem = make_loop_fs()
    quiesce = make_quiesce(filesystem)
    await quiesce.begin("a", 1_000)
    started_s = time.monotonic()
    writer = Writer(filesystem)
    assert await asyncio.to_thread(writer.process.wait, 10) == 0
    assert time.monotonic() - started_s < 1.5
    ended = await quiesce.end("a")
    assert not ended.held
    assert ended.reason == "lease-expired"
    with pytest.raises(LeaseExpired):
        await quiesce.renew("a", 1_000)


async def test_renew_moves_the_end(make_loop_fs: MakeLoopFs, make_quiesce: MakeQuiesce) -> None:
    filesystem = make_loop_fs()
    quiesce = make_quiesce(filesystem)
    await quiesce.begin("a", 1_000)
    for _ in range(3):
        await quiesce.renew("a", 1_000)
        await asyncio.sleep(0.6)  # longer in sum than the first lease
    assert quiesce.status().state == "frozen"
    assert (await quiesce.end("a")).held


async def test_another_id_is_turned_away_by_name(make_loop_fs: MakeLoopFs, make_quiesce: MakeQuiesce) -> None:
    quiesce = make_quiesce(make_loop_fs())
    await quiesce.begin("a", 30_000)
    with pytest.raises(Busy) as caught:
        await quiesce.begin("b", 30_000)
    assert caught.value.data["id"] == "a"
    assert 0 < caught.value.data["lease-left-ms"] <= 30_000
    with pytest.raises(NoSuchId):
        await quiesce.end("b")
    await quiesce.end("a")
    with pytest.raises(BadRequest, match="has ended"):
        await quiesce.begin("a", 30_000)


async def test_what_a_stranger_froze_fails_the_freeze_and_nothing_stays_frozen(
    make_loop_fs: MakeLoopFs, make_quiesce: MakeQuiesce
) -> None:
    ours, theirs = make_loop_fs(), make_loop_fs()
    subprocess.run(["fsfreeze", "-f", theirs.path], check=True)
    quiesce = make_quiesce(ours, theirs)
    with pytest.raises(KernelFailure, match=str(theirs.path)):
        await quiesce.begin("a", 30_000)
    assert not is_frozen(ours)
    assert is_frozen(theirs)
    begun = await quiesce.begin("b", 30_000, degrade=True)
    assert begun.consistency == "none"
    assert [one.state for one in begun.filesystems] == ["frozen", "failed"]
    await quiesce.end("b")
    assert is_frozen(theirs)


async def test_thawed_by_a_stranger_did_not_hold(make_loop_fs: MakeLoopFs, make_quiesce: MakeQuiesce) -> None:
    filesystem = make_loop_fs()
    quiesce = make_quiesce(filesystem)
    await quiesce.begin("a", 30_000)
    subprocess.run(["fsfreeze", "-u", filesystem.path], check=True)
    ended = await quiesce.end("a")
    assert (ended.held, ended.reason) == (False, "thawed-by-stranger")


async def test_killed_guard_is_thawed_at_once(
    make_loop_fs: MakeLoopFs, make_quiesce: MakeQuiesce, guard: GuardProcess
) -> None:
    filesystem = make_loop_fs()
    quiesce = make_quiesce(filesystem)
    await quiesce.begin("a", 30_000)
    writer = Writer(filesystem)
    await writer.wait_blocked()
    guard.process.kill()
    assert await asyncio.to_thread(writer.process.wait, 1.0) == 0
    ended = await quiesce.end("a")
    assert (ended.held, ended.reason) == (False, "guard-lost")


async def test_stopped_guard_is_thawed_after_the_lease(
    make_loop_fs: MakeLoopFs, make_quiesce: MakeQuiesce, guard: GuardProcess
) -> None:
    filesystem = make_loop_fs()
    quiesce = make_quiesce(filesystem)
    await quiesce.begin("a", 1_000)
    started_s = time.monotonic()
    guard.process.send_signal(signal.SIGSTOP)
    writer = Writer(filesystem)
    assert await asyncio.to_thread(writer.process.wait, 10) == 0
    assert time.monotonic() - started_s < 1.0 + 1.0 + 1.0
    ended = await quiesce.end("a")
    assert (ended.held, ended.reason) == (False, "lease-expired")


async def test_a_writer_in_the_middle_of_its_write_leaves_nothing_frozen_when_it_wakes(
    make_loop_fs: MakeLoopFs, make_quiesce: MakeQuiesce, guard: GuardProcess
) -> None:
    free, held_up = make_loop_fs(), make_loop_fs()
    quiesce = make_quiesce(free, held_up)
    parked = ParkedWriter(str(held_up.path))
    parked.park()
    try:
        with pytest.raises((LeaseExpired, DeadlineExceeded)):
            await quiesce.begin("a", 1_000)
        assert not is_frozen(free)
        assert [one.state for one in quiesce.status().filesystems] == ["thawed", "freezing"]
        with pytest.raises(Busy):
            await quiesce.begin("b", 1_000)
        await asyncio.sleep(GRACE_S + 0.5)  # beyond the moment when the net would act if the guard had not
        assert guard.process.poll() is None
        assert quiesce.is_frozen
    finally:
        parked.let_go()
    begun = await asyncio.wait_for(_begin_when_free(quiesce, "c"), 5)
    assert begun.consistency == "filesystem"
    assert (await quiesce.end("c")).held
    assert (await quiesce.end("a")).reason == "lease-expired"


async def _begin_when_free(quiesce: Quiesce, session_id: str) -> QuiesceBegun:
    while True:
        try:
            return await quiesce.begin(session_id, 30_000)
        except Busy:
            await asyncio.sleep(0.02)


async def test_loop_file_on_a_frozen_file_system_is_frozen_before_it(
    make_loop_fs: MakeLoopFs, make_quiesce: MakeQuiesce
) -> None:
    parent = make_loop_fs("ext4", size_bytes=256 << 20)
    child = make_loop_fs("ext4", image=parent.path / "child.img")
    for _ in range(3):
        (child.path / "dirty").write_bytes(os.urandom(1 << 20))
        quiesce = make_quiesce(parent, child)
        begun = await quiesce.begin(f"{time.monotonic_ns()}", 20_000)
        assert [one.mountpoint for one in begun.filesystems] == [str(child.path), str(parent.path)]
        assert (await quiesce.end(begun.id)).held


async def test_guest_fsfreeze_counts_and_tells_of_an_expiry_once(
    make_loop_fs: MakeLoopFs, make_quiesce: MakeQuiesce
) -> None:
    one, two = make_loop_fs(), make_loop_fs()
    quiesce = make_quiesce(one, two, settings=Settings(lease_ms=1_000))
    assert await quiesce.qga_thaw() == 0
    assert await quiesce.qga_freeze(None) == 2
    assert await quiesce.qga_thaw() == 2
    assert await quiesce.qga_freeze([str(one.path), "/no/such/mount"]) == 1
    writer = Writer(one)
    assert await asyncio.to_thread(writer.process.wait, 10) == 0
    with pytest.raises(LeaseExpired):
        await quiesce.qga_thaw()
    assert await quiesce.qga_thaw() == 0
    assert await quiesce.qga_freeze(["/no/such/mount"]) == 0
    assert quiesce.status().state == "thawed"


async def test_no_descriptor_or_thread_stays_behind(make_loop_fs: MakeLoopFs, make_quiesce: MakeQuiesce) -> None:
    quiesce = make_quiesce(make_loop_fs())
    descriptors = []
    for number in range(4):
        await quiesce.begin(str(number), 30_000)
        await quiesce.end(str(number))
        for net in [thread for thread in threading.enumerate() if thread.name == "quiesce-net"]:
            await asyncio.to_thread(net.join, 5)
        descriptors.append(len(list(Path("/proc/self/fd").iterdir())))
    assert descriptors[1:] == descriptors[1:2] * 3


async def test_a_freeze_tells_what_it_risks(
    make_loop_fs: MakeLoopFs, make_quiesce: MakeQuiesce, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    filesystem = make_loop_fs("ext4")
    quiesce = make_quiesce(filesystem)
    (tmp_path / "tree/proc/swaps").write_text(f"Filename Type Size\n{filesystem.path}/swap file 1024\n")
    risk = f"{filesystem.path}/swap is swapped to while {filesystem.path} is frozen, so its disk is not still"
    assert risk in [risk.detail for risk in (await quiesce.begin("a", 30_000)).risks]
    assert f"freeze a: swap-file: {risk}" in caplog.text
    assert (await quiesce.end("a")).held


async def test_a_freeze_tells_what_was_left_to_write(
    make_loop_fs: MakeLoopFs, make_quiesce: MakeQuiesce, tmp_path: Path
) -> None:
    quiesce = make_quiesce(make_loop_fs())
    assert (await quiesce.begin("a", 30_000)).dirty_bytes is None
    await quiesce.end("a")
    (tmp_path / "tree/proc/meminfo").write_text("Dirty: 12 kB\nWriteback: 4 kB\n")
    assert (await quiesce.begin("b", 30_000)).dirty_bytes == 16 << 10
    await quiesce.end("b")
