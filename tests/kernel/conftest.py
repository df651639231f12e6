"""Real file systems on loop devices, a real guard, and a thaw that is armed before anything is frozen."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from ballast.guest.config import Config
from ballast.guest.config import Quiesce as Settings
from ballast.guest.config import Writers as WriterSettings
from ballast.guest.events import Events
from ballast.guest.linux.mountinfo import parse_mountinfo
from ballast.guest.linux.tree import Tree
from ballast.guest.quiesce.session import Quiesce
from ballast.guest.quiesce.writers import Finder

AGENT = Path(__file__).parents[2] / "agent"
RESCUE_S = 60  # a frozen loop device thaws after this, whatever became of the test


@dataclass(frozen=True, slots=True)
class LoopFs:
    """A mounted file system in a file."""

    path: Path
    type: str
    image: Path

    @property
    def device(self) -> str:
        """Its superblock's "major:minor"."""
        mounts = parse_mountinfo(Path("/proc/self/mountinfo").read_text())
        return next(mount.device for mount in mounts if mount.mountpoint == str(self.path))


MakeLoopFs = Callable[..., LoopFs]


def _can_mount_loops(folder: Path) -> bool:
    """Try it: being root is not what counts."""
    image, point = folder / "probe.img", folder / "probe"
    point.mkdir()
    with image.open("wb") as file:
        file.truncate(1 << 23)
    subprocess.run(["mkfs.ext4", "-q", image], check=True)
    if subprocess.run(["mount", "-o", "loop", image, point], check=False, capture_output=True).returncode:
        return False
    subprocess.run(["umount", point], check=True)
    return True


@pytest.fixture(scope="session", autouse=True)
def _loops(tmp_path_factory: pytest.TempPathFactory) -> None:
    if not _can_mount_loops(tmp_path_factory.mktemp("probe")):
        pytest.skip("cannot mount loop devices here")


@pytest.fixture
def make_loop_fs(tmp_path: Path) -> Iterator[MakeLoopFs]:
    """Make file systems; all are thawed and unmounted at the end."""
    made: list[LoopFs] = []
    rescuers: list[subprocess.Popen[bytes]] = []

    def make(kind: str = "ext4", *, image: Path | None = None, size_bytes: int | None = None) -> LoopFs:
        number = len(made)
        image = image or tmp_path / f"{number}.img"
        point = tmp_path / f"fs{number}"
        point.mkdir()
        with image.open("wb") as file:
            file.truncate(size_bytes or {"ext4": 64 << 20, "xfs": 320 << 20, "btrfs": 128 << 20}[kind])
        subprocess.run([f"mkfs.{kind}", "-q", image], check=True)
        subprocess.run(["mount", "-o", "loop", image, point], check=True)
        filesystem = LoopFs(point, kind, image)
        made.append(filesystem)
        # In another process, before any freeze: a writer on a frozen disk cannot be killed, not even with us.
        rescue = f"sleep {RESCUE_S}; while fsfreeze --unfreeze {point}; do :; done"
        rescuers.append(subprocess.Popen(["setsid", "sh", "-c", rescue], stderr=subprocess.DEVNULL))
        return filesystem

    yield make
    for filesystem in reversed(made):
        while subprocess.run(["fsfreeze", "-u", filesystem.path], check=False, capture_output=True).returncode == 0:
            pass
        subprocess.run(["umount", filesystem.path], check=True, timeout=30)
    for rescuer in rescuers:
        os.killpg(rescuer.pid, signal.SIGKILL)
        rescuer.wait()


@pytest.fixture
def loop_tree(tmp_path: Path) -> Callable[..., Tree]:
    """A kernel tree whose table of mounts lists only ours: nothing of this machine can be frozen by mistake."""

    def make(*filesystems: LoopFs) -> Tree:
        root = tmp_path / "tree"
        (root / "proc/1").mkdir(parents=True, exist_ok=True)
        if not (root / "sys").exists():
            (root / "sys").symlink_to("/sys")
        points = {str(filesystem.path) for filesystem in filesystems}
        lines = Path("/proc/self/mountinfo").read_text().splitlines(keepends=True)
        ours = [line for line in lines if parse_mountinfo(line)[0].mountpoint in points]
        assert len(ours) >= len(points)
        (root / "proc/1/mountinfo").write_text("".join(ours))
        return Tree(root)

    return make


@dataclass(slots=True)
class GuardProcess:
    """A guard as systemd would start it, and its socket."""

    socket_path: Path
    process: subprocess.Popen[bytes]


@pytest.fixture
def guard(tmp_path: Path) -> Iterator[GuardProcess]:
    """A guard that listens; SIGTERM and the test's end both make it thaw."""
    path = tmp_path / "guard.sock"
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(str(path))
    listener.listen(4)
    program = (
        "import os, sys; os.dup2(int(sys.argv[1]), 3); os.environ['LISTEN_PID'] = str(os.getpid());"
        "from ballast.guest.quiesce.guard import main; sys.exit(main())"
    )
    process = subprocess.Popen(
        ["/usr/bin/python3", "-B", "-c", program, str(listener.fileno())],
        pass_fds=[listener.fileno()],
        env={"PYTHONPATH": str(AGENT), "LISTEN_FDS": "1", "PATH": os.environ["PATH"]},
        stderr=sys.stderr,
    )
    listener.close()
    yield GuardProcess(path, process)
    process.send_signal(signal.SIGCONT)
    process.terminate()
    process.wait(timeout=30)


@pytest.fixture
async def make_quiesce(
    tmp_path: Path, guard: GuardProcess, loop_tree: Callable[..., Tree]
) -> AsyncIterator[Callable[..., Quiesce]]:
    """The agent's side, running, over nothing but the given file systems."""

    tasks = []

    def make(
        *filesystems: LoopFs,
        settings: Settings | None = None,
        events: Events | None = None,
        find_writers: Finder = list,
        writer_timeout_ms: int = 60_000,
    ) -> Quiesce:
        quiesce = Quiesce(
            loop_tree(*filesystems),
            events or Events(),
            Config(quiesce=settings or Settings(), writers=WriterSettings(timeout_ms=writer_timeout_ms)),
            find_writers,
            record_path=tmp_path / "quiesce.json",
            guard_path=str(guard.socket_path),
            markers=tmp_path / "markers",
        )
        tasks.append(asyncio.create_task(quiesce.run()))
        return quiesce

    yield make
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
