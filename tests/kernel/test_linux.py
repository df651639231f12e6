"""Kernel calls against independent tools, the last net, and the guard by itself; all on loop devices of our own."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from ballast.guest.linux import fsfreeze
from ballast.guest.linux.uevents import Uevent, UeventSocket
from ballast.guest.quiesce import guard_protocol as protocol
from ballast.guest.quiesce.leftovers import Leftover, open_filesystem, thaw_leftovers
from ballast.guest.quiesce.record import Open, process_start
from tests.kernel.conftest import AGENT, GuardProcess, LoopFs, MakeLoopFs
from tests.kernel.test_quiesce import Writer, is_frozen

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


async def test_uevents_of_one_subsystem_come_from_the_kernel(make_loop_fs: MakeLoopFs) -> None:
    """A synthetic one, of our own loop device (Documentation/ABI/testing/sysfs-uevent)."""
    device = Path(f"/sys/dev/block/{make_loop_fs().device}").resolve()
    uevents, readable = UeventSocket("block"), asyncio.Event()
    loop = asyncio.get_running_loop()
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
for name in (b"caf\\xe9", "form\\x0cfeed".encode(), "line\\u2028separator".encode()):
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


# quiesce/guard.py, spoken to as an agent would


class Agent:
    """A connection to the guard."""

    def __init__(self, guard: GuardProcess) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.settimeout(DEADLINE_S)
        self.socket.connect(str(guard.socket_path))

    def receive(self) -> dict[str, Any] | None:
        """The next message; None when the guard hung up."""
        try:
            return protocol.receive(self.socket)[0]
        except ConnectionResetError:
            return None

    def wait_for(self, event: str) -> dict[str, Any]:
        """Pass over others."""
        while (message := self.receive()) is not None:
            if message["event"] == event:
                return message
        raise AssertionError(f"the guard hung up before {event!r}")

    def freeze(self, *filesystems: LoopFs, lease_s: float = 30) -> None:
        """Freeze them on one level, and wait until they are."""
        with contextlib.ExitStack() as stack:
            fds = [stack.enter_context(opened(filesystem.path)) for filesystem in filesystems]
            levels = [list(range(len(fds)))]
            expires_s = protocol.boottime_s() + lease_s
            protocol.send(self.socket, {"op": "freeze", "levels": levels, "expires_s": expires_s}, fds)
        self.wait_for("frozen")


@pytest_asyncio.fixture
async def agent(guard: GuardProcess) -> AsyncIterator[Agent]:
    made = Agent(guard)
    hello = made.receive()
    assert hello == {"event": "hello", "version": protocol.VERSION, "pid": guard.process.pid}
    yield made
    made.socket.close()


async def blocked_writer(filesystem: LoopFs) -> Writer:
    """Proof that it is frozen."""
    writer = Writer(filesystem)
    await writer.wait_blocked()
    return writer


async def wait_done(writer: Writer, *, within_s: float) -> None:
    """Proof that it is thawed."""
    assert await asyncio.to_thread(writer.process.wait, within_s) == 0


async def test_second_client_while_one_holds_is_told_busy(
    make_loop_fs: MakeLoopFs, guard: GuardProcess, agent: Agent
) -> None:
    filesystem = make_loop_fs()
    agent.freeze(filesystem)
    second = Agent(guard)
    with second.socket:
        assert second.receive() == {"event": "busy"}
        assert second.receive() is None
    assert is_frozen(filesystem)
    protocol.send(agent.socket, {"op": "thaw"})
    assert agent.wait_for("thawed")["cause"] == "thaw"
    agent.wait_for("idle")
    assert not is_frozen(filesystem)


async def test_a_client_that_holds_nothing_gives_way(
    make_loop_fs: MakeLoopFs, guard: GuardProcess, agent: Agent
) -> None:
    second = Agent(guard)
    with second.socket:
        assert second.wait_for("hello")
        assert agent.receive() is None
        second.freeze(make_loop_fs())


async def test_the_agent_s_socket_closing_thaws_at_once(
    make_loop_fs: MakeLoopFs, guard: GuardProcess, agent: Agent
) -> None:
    filesystems = [make_loop_fs("ext4"), make_loop_fs("xfs")]
    agent.freeze(*filesystems)
    writers = [await blocked_writer(filesystem) for filesystem in filesystems]
    agent.socket.close()
    for writer in writers:
        await wait_done(writer, within_s=1)
    assert guard.process.poll() is None


async def test_sigterm_thaws_and_exits_0(make_loop_fs: MakeLoopFs, guard: GuardProcess, agent: Agent) -> None:
    filesystem = make_loop_fs()
    agent.freeze(filesystem)
    writer = await blocked_writer(filesystem)
    guard.process.terminate()
    await wait_done(writer, within_s=1)
    assert agent.wait_for("thawed")["cause"] == "stopped"
    assert await asyncio.to_thread(guard.process.wait, DEADLINE_S) == 0


async def test_lease_end_thaws_though_nobody_asks_and_a_renewal_moves_it(
    make_loop_fs: MakeLoopFs, agent: Agent
) -> None:
    filesystem = make_loop_fs()
    agent.freeze(filesystem, lease_s=600)
    writer = await blocked_writer(filesystem)
    protocol.send(agent.socket, {"op": "renew", "expires_s": protocol.boottime_s() + 0.2})
    agent.wait_for("renewed")
    await wait_done(writer, within_s=1)
    assert agent.wait_for("thawed") == {
        "event": "thawed",
        "cause": "lease",
        "filesystems": [{"state": "thawed", "errno": 0, "freeze_ms": pytest.approx(500, abs=500)}],
    }


NONSENSE = [
    b"garbage",
    b"\xff",
    b"5",
    b"{}",
    b'{"op": "renew"}',
    b'{"op": "renew", "expires_s": "soon"}',
    b'{"op": "renew", "expires_s": null}',
]


@pytest.mark.parametrize("nonsense", NONSENSE)
async def test_nonsense_while_frozen_thaws_and_the_guard_lives(
    make_loop_fs: MakeLoopFs, guard: GuardProcess, agent: Agent, nonsense: bytes
) -> None:
    filesystem = make_loop_fs()
    agent.freeze(filesystem)
    writer = await blocked_writer(filesystem)
    agent.socket.send(nonsense)
    await wait_done(writer, within_s=1)
    await serves_on(guard)


NONSENSE_ORDERS: list[dict[str, Any]] = [
    {"levels": [[5]], "expires_s": 0},
    {"levels": 5, "expires_s": 0},
    {"levels": [["x"]], "expires_s": 0},
    {"levels": [[0]]},
    {"expires_s": 0},
    {"levels": [[0]], "expires_s": "never"},
]


@pytest.mark.parametrize("order", NONSENSE_ORDERS, ids=repr)
async def test_an_order_that_makes_no_sense_freezes_nothing_and_leaves_nothing(
    make_loop_fs: MakeLoopFs, guard: GuardProcess, agent: Agent, order: dict[str, Any]
) -> None:
    filesystem = make_loop_fs()
    with opened(filesystem.path) as fd:
        protocol.send(agent.socket, {"op": "freeze"} | order, [fd])
    while agent.receive() is not None:
        pass
    assert not is_frozen(filesystem)
    await serves_on(guard)


async def serves_on(guard: GuardProcess) -> None:
    """The guard is there for the next agent."""
    async with asyncio.timeout(DEADLINE_S):
        while True:
            with (following := Agent(guard)).socket:
                message = following.receive()
            assert guard.process.poll() is None
            if message and message["event"] == "hello":
                return
            await asyncio.sleep(0.01)  # it says busy until its threads have ended


async def test_nothing_of_a_session_stays_in_the_guard(
    make_loop_fs: MakeLoopFs, guard: GuardProcess, agent: Agent
) -> None:
    filesystem = make_loop_fs()
    process = Path(f"/proc/{guard.process.pid}")
    descriptors = []
    for _ in range(3):
        agent.freeze(filesystem)
        protocol.send(agent.socket, {"op": "thaw"})
        agent.wait_for("idle")
        descriptors.append(len(list((process / "fd").iterdir())))
        # The thread that told of the end may be about to end itself.
        assert len(list((process / "task").iterdir())) <= 2
    assert descriptors == descriptors[:1] * 3
