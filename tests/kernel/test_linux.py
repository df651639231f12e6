"""Kernel calls against independent tools, and the last net; all on loop devices of our own."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ballast.guest.linux import fsfreeze
from ballast.guest.linux.uevents import Uevent, UeventSocket
from ballast.guest.quiesce.leftovers import Leftover, open_filesystem, thaw_leftovers
from ballast.guest.quiesce.record import Open, process_start
from tests.kernel.conftest import AGENT, LoopFs, MakeLoopFs
from tests.kernel.test_quiesce import is_frozen

DEADLINE_S = 10
EVERY_TYPE = pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs"])


@contextlib.contextmanager
def opened(path: Path) -> Iterator[int]:
    """A descriptor of a folder."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def mounted(*arguments: str | Path) -> Iterator[Path]:
    """A mount for as long; the last argument is where."""
    subprocess.run(["mount", *arguments], check=True)
    try:
        yield Path(arguments[-1])
    finally:
        subprocess.run(["umount", arguments[-1]], check=True, timeout=30)


def fsfreeze8(option: str, filesystem: LoopFs) -> str:
    """What fsfreeze(8) complains of; nothing if it did it."""
    ran = subprocess.run(["fsfreeze", option, filesystem.path], check=False, capture_output=True, text=True, timeout=30)
    assert (ran.returncode == 0) == (not ran.stderr)
    return ran.stderr


# linux/


@EVERY_TYPE
def test_what_we_freeze_fsfreeze_finds_busy_and_can_thaw(make_loop_fs: MakeLoopFs, kind: str) -> None:
    filesystem = make_loop_fs(kind)
    with opened(filesystem.path) as fd:
        fsfreeze.freeze(fd)
        assert "busy" in fsfreeze8("--freeze", filesystem)
        assert fsfreeze8("--unfreeze", filesystem) == ""
        with pytest.raises(OSError, match="Invalid argument") as caught:
            fsfreeze.thaw(fd)
        assert caught.value.errno == errno.EINVAL


@EVERY_TYPE
def test_what_fsfreeze_froze_is_busy_to_us_and_we_can_thaw(make_loop_fs: MakeLoopFs, kind: str) -> None:
    filesystem = make_loop_fs(kind)
    assert fsfreeze8("--freeze", filesystem) == ""
    with opened(filesystem.path) as fd:
        with pytest.raises(OSError, match="busy") as caught:
            fsfreeze.freeze(fd)
        assert caught.value.errno == errno.EBUSY
        fsfreeze.thaw(fd)
    assert "Invalid argument" in fsfreeze8("--unfreeze", filesystem)


def test_a_tmpfs_cannot_be_frozen(tmp_path: Path) -> None:
    with mounted("-t", "tmpfs", "tmpfs", tmp_path) as point, opened(point) as fd:
        with pytest.raises(OSError, match="not supported") as caught:
            fsfreeze.freeze(fd)
        assert caught.value.errno == errno.EOPNOTSUPP


def test_freezing_needs_a_privilege_and_the_descriptor_s_opener_does_not_matter(make_loop_fs: MakeLoopFs) -> None:
    with opened(make_loop_fs().path) as fd:
        os.seteuid(65534)
        try:
            with pytest.raises(PermissionError):
                fsfreeze.freeze(fd)
        finally:
            os.seteuid(0)


def test_sync_writes_what_was_dirty(make_loop_fs: MakeLoopFs) -> None:
    filesystem = make_loop_fs()
    loop = Path(f"/sys/dev/block/{filesystem.device}")

    def written_bytes() -> int:
        return 512 * int((loop / "stat").read_text().split()[6])

    with opened(filesystem.path) as fd:
        fsfreeze.sync(fd)
        before_bytes = written_bytes()
        (filesystem.path / "dirty").write_bytes(os.urandom(1 << 20))
        fsfreeze.sync(fd)
    assert written_bytes() >= before_bytes + (1 << 20)


def test_sync_of_no_descriptor_is_an_error() -> None:
    with pytest.raises(OSError, match="syncfs") as caught:
        fsfreeze.sync(-1)
    assert caught.value.errno == errno.EBADF


def test_locking_memory_touches_none() -> None:
    program = """
from ballast.guest.linux.mman import lock_all_memory

def kib(name):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(name))

kib("VmRSS")
before = kib("VmRSS")
lock_all_memory()
print(kib("VmLck"), kib("VmRSS") - before)
"""
    command = ["/usr/bin/python3", "-B", "-c", program]
    ran = subprocess.run(command, env={"PYTHONPATH": str(AGENT)}, check=True, capture_output=True, text=True)
    locked_kib, grown_kib = map(int, ran.stdout.split())
    assert locked_kib > 0
    assert grown_kib < 1024


def test_a_process_can_do_without_huge_pages() -> None:
    program = """
from pathlib import Path
from ballast.guest.linux.mman import avoid_huge_pages

def allowed():
    return [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("THP_enabled:")]

before = allowed()
avoid_huge_pages()
print(before, allowed())
"""
    command = ["/usr/bin/python3", "-B", "-c", program]
    ran = subprocess.run(command, env={"PYTHONPATH": str(AGENT)}, check=True, capture_output=True, text=True)
    assert ran.stdout == "['THP_enabled:\\t1'] ['THP_enabled:\\t0']\n"


async def test_uevents_of_one_subsystem_come_from_the_kernel(make_loop_fs: MakeLoopFs) -> None:
    """A synthetic one, of our own loop device (Documentation/ABI/testing/sysfs-uevent)."""
    device = Path(f"/sys/dev/block/{make_loop_fs().device}").resolve()
    readable, loop = asyncio.Event(), asyncio.get_running_loop()
    with contextlib.closing(UeventSocket("block")) as uevents:
        loop.add_reader(uevents.fileno(), readable.set)
        try:
            (device / "uevent").write_text("change")
            heard: list[Uevent | None] = []
            async with asyncio.timeout(DEADLINE_S):
                while Uevent("change", "block", device.name) not in heard:
                    readable.clear()
                    await readable.wait()
                    heard += uevents.read()
        finally:
            loop.remove_reader(uevents.fileno())
        assert {uevent.subsystem for uevent in heard if uevent} == {"block"}
        assert list(uevents.read()) == []


def test_that_uevents_were_lost_is_told(make_loop_fs: MakeLoopFs) -> None:
    device = Path(f"/sys/dev/block/{make_loop_fs().device}").resolve()
    with contextlib.closing(UeventSocket("block")) as uevents:
        for _ in range(2000):  # ten times what the socket's buffer holds
            (device / "uevent").write_text("change")
        heard = list(uevents.read())
    assert None in heard
    assert Uevent("change", "block", device.name) in heard


# quiesce/leftovers.py: whom to thaw


def test_a_file_system_behind_another_mount_is_not_mistaken_for_it(make_loop_fs: MakeLoopFs, tmp_path: Path) -> None:
    hidden, other = make_loop_fs(), make_loop_fs()
    device = hidden.device
    second = tmp_path / "second"
    second.mkdir()
    with mounted("--bind", hidden.path, second), mounted("--bind", other.path, hidden.path):
        with pytest.raises(OSError, match="hidden") as caught:
            open_filesystem([str(hidden.path)], device)
        assert caught.value.errno == errno.ENODEV
        fd = open_filesystem([str(hidden.path), str(second)], device)
        assert os.fstat(fd).st_dev == second.stat().st_dev
        os.close(fd)


def test_a_mount_point_that_is_gone_is_its_own_error(make_loop_fs: MakeLoopFs, tmp_path: Path) -> None:
    filesystem = make_loop_fs()
    with pytest.raises(FileNotFoundError):
        open_filesystem([str(tmp_path / "none")], filesystem.device)
    os.close(open_filesystem([str(tmp_path / "none"), str(filesystem.path)], filesystem.device))


def test_a_btrfs_subvolume_is_known_by_its_superblock(make_loop_fs: MakeLoopFs, tmp_path: Path) -> None:
    """stat(2) gives each subvolume a device number of its own, the table of mounts does not."""
    filesystem = make_loop_fs("btrfs")
    subprocess.run(["btrfs", "-q", "subvolume", "create", filesystem.path / "volume"], check=True)
    point = tmp_path / "volume"
    point.mkdir()
    with mounted("--bind", filesystem.path / "volume", point):
        assert point.stat().st_dev != filesystem.path.stat().st_dev
        fd = open_filesystem([str(point)], filesystem.device)
        fsfreeze.freeze(fd)
        assert is_frozen(filesystem)
        fsfreeze.thaw(fd)
        os.close(fd)


def test_somebody_s_odd_mount_point_hides_nothing(make_loop_fs: MakeLoopFs) -> None:
    """In a mount namespace of its own: other programs on this machine may not be ready for such names."""
    filesystem = make_loop_fs()
    program = f"""
import os, subprocess
from ballast.guest.quiesce.leftovers import open_filesystem
for name in (b"x\\xe9", "form\\x0cfeed".encode(), "line\\u2028separator".encode()):
    point = {os.fsencode(filesystem.path)!r} + b"/" + name
    os.mkdir(point)
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", point], check=True)
open_filesystem([{str(filesystem.path)!r}], {filesystem.device!r})
"""
    command = ["unshare", "--mount", "/usr/bin/python3", "-B", "-c", program]
    subprocess.run(command, check=True, env={"PYTHONPATH": str(AGENT), "PATH": os.environ["PATH"]})


def record_of(*filesystems: LoopFs, pid: int, start: str = "1") -> Open:
    """A session that a guard held, as it stands in /run."""
    listed = [{"mountpoints": [str(one.path)], "device": one.device} for one in filesystems]
    return Open("a", pid, start, listed)


@pytest.fixture
def gone() -> int:
    """The pid of a guard that is no more."""
    process = subprocess.Popen(["/bin/true"])
    process.wait()
    return process.pid


@pytest.fixture
def alive() -> Iterator[tuple[int, str]]:
    """Pid and start of a guard that is stuck: it lives and does nothing."""
    process = subprocess.Popen(["/bin/sleep", "300"])
    yield process.pid, process_start(process.pid)
    process.kill()
    process.wait()


def test_exactly_what_the_record_lists_is_thawed(make_loop_fs: MakeLoopFs, gone: int) -> None:
    ours, theirs, thawed = make_loop_fs("ext4"), make_loop_fs("ext4"), make_loop_fs("xfs")
    for filesystem in (ours, theirs):
        assert fsfreeze8("--freeze", filesystem) == ""
    found = thaw_leftovers(record_of(thawed, ours, pid=gone), deadline_s=time.monotonic() + DEADLINE_S)
    assert found == [Leftover(str(ours.path), thawed=True), Leftover(str(thawed.path), thawed=False)]
    assert not is_frozen(ours)
    assert is_frozen(theirs)


def test_when_its_freezer_is_gone_and_nothing_is_frozen_it_gives_up(make_loop_fs: MakeLoopFs, gone: int) -> None:
    filesystem = make_loop_fs()
    started_s = time.monotonic()
    assert thaw_leftovers(record_of(filesystem, pid=gone), deadline_s=started_s + 100) == [
        Leftover(str(filesystem.path), thawed=False)
    ]
    assert time.monotonic() - started_s < DEADLINE_S


def test_a_pid_that_is_somebody_else_s_by_now_is_gone(make_loop_fs: MakeLoopFs, alive: tuple[int, str]) -> None:
    filesystem = make_loop_fs()
    started_s = time.monotonic()
    thaw_leftovers(record_of(filesystem, pid=alive[0], start="1"), deadline_s=started_s + 100)
    assert time.monotonic() - started_s < DEADLINE_S


async def test_a_freeze_that_comes_late_is_waited_for(make_loop_fs: MakeLoopFs, alive: tuple[int, str]) -> None:
    """As FIFREEZE does that waits for a writer: it freezes when the writer is done, whoever has died since."""
    filesystem = make_loop_fs()
    session = record_of(filesystem, pid=alive[0], start=alive[1])
    thawing = asyncio.to_thread(thaw_leftovers, session, deadline_s=time.monotonic() + 100)
    task = asyncio.create_task(thawing)
    await asyncio.sleep(0)
    assert fsfreeze8("--freeze", filesystem) == ""
    async with asyncio.timeout(DEADLINE_S):
        assert await task == [Leftover(str(filesystem.path), thawed=True)]
    assert not is_frozen(filesystem)


def test_a_freezer_that_lives_for_ever_is_waited_for_until_the_deadline(
    make_loop_fs: MakeLoopFs, alive: tuple[int, str]
) -> None:
    filesystem = make_loop_fs()
    session = record_of(filesystem, pid=alive[0], start=alive[1])
    assert thaw_leftovers(session, deadline_s=time.monotonic() + 0.3) == [Leftover(str(filesystem.path), thawed=False)]


def test_what_was_unmounted_since_is_passed_over(make_loop_fs: MakeLoopFs, tmp_path: Path, gone: int) -> None:
    session = record_of(make_loop_fs(), pid=gone)
    session.filesystems.insert(0, {"mountpoints": [str(tmp_path / "none")], "device": "7:99"})
    session.filesystems.insert(0, {"mountpoints": [str(tmp_path)], "device": "7:99"})
    assert len(thaw_leftovers(session, deadline_s=time.monotonic() + DEADLINE_S)) == 1
