"""Runs inside the guest: sees with its own writes when file systems are frozen, does harm, and sees when they thaw.

    witness.py '{"harms": [...], "afterwards": [...], "mountpoints": [...], "parked": false}'

Everything it needs is loaded and opened before the freeze, and it lives on a tmpfs, so that nothing of it waits for a
frozen disk but the writes that are meant to. Its last line is a JSON object: {"thawed_s": {mountpoint: seconds from
the harm to the first write that went through}, ...}. A rescuer in a process of its own thaws all after RESCUE_S, so
that a failure ends as one.

Harms are the methods of Harm, each with what it is done to; ``afterwards`` are done when all writes again.
``parked`` holds a writer of the last mount point in the middle of its write (userfaultfd) while the lease runs out, and
lets it go when the others are thawed. Without it the harm waits until GO exists: writers stand still long before the
last FIFREEZE has returned.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import mmap
import os
import signal
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

GO = Path("/run/lab-witness.go")
RESCUE_S = 80  # longer than any lease here
BLOCKED_S = 0.3  # a writer that has not come through for this long is held up
PERIOD_S = 0.005
CGROUPS = Path("/sys/fs/cgroup/ballast.slice")
OOM_LIMIT = "4M"  # less than any process of Python's
UPGRADE = """
case $(dpkg-query --show --showformat '${Version}' ballast-agent) in *next) folder=dist ;; *) folder=next ;; esac
exec dpkg --install /run/install/$folder/*.deb </dev/null >/run/lab-dpkg.log 2>&1
"""
_FITHAW = 0xC0045878  # include/uapi/linux/fs.h
_MNT_DETACH = 2  # include/uapi/linux/mount.h

# include/uapi/linux/userfaultfd.h
_SYS_USERFAULTFD = 323
_UFFDIO_API, _UFFDIO_REGISTER, _UFFDIO_COPY = 0xC018AA3F, 0xC020AA00, 0xC028AA03
_UFFD_API, _MODE_MISSING = 0xAA, 1


class Writer(threading.Thread):
    """Overwrites one byte of a file again and again; ``last_s`` is when that last went through."""

    def __init__(self, mountpoint: str) -> None:
        super().__init__(daemon=True)
        self.mountpoint = mountpoint
        self.last_s = time.monotonic()
        self._fd = os.open(Path(mountpoint, ".witness"), os.O_WRONLY | os.O_CREAT, 0o600)

    @property
    def is_held_up(self) -> bool:
        """Whether it sleeps uninterruptibly and has not come through for a while: a busy machine does not do that."""
        if time.monotonic() - self.last_s < BLOCKED_S:
            return False
        return is_asleep_in_the_kernel(self.native_id or 0)

    def run(self) -> None:
        """Write until the process ends."""
        while True:
            with contextlib.suppress(OSError):  # its disk was taken out: that is no waiting
                os.pwrite(self._fd, b"x", 0)
            self.last_s = time.monotonic()
            time.sleep(PERIOD_S)


class ParkedWriter(threading.Thread):
    """Stands still inside a write(2), holding the file system's write count, until let go."""

    def __init__(self, mountpoint: str) -> None:
        super().__init__(daemon=True)
        libc = ctypes.CDLL(None, use_errno=True)
        self._uffd = libc.syscall(_SYS_USERFAULTFD, os.O_CLOEXEC)
        if self._uffd < 0:
            raise OSError(ctypes.get_errno(), "userfaultfd")
        fcntl.ioctl(self._uffd, _UFFDIO_API, bytearray(struct.pack("QQQ", _UFFD_API, 0, 0)))
        self._page = mmap.mmap(-1, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._page))
        range_ = struct.pack("QQQQ", self._address, mmap.PAGESIZE, _MODE_MISSING, 0)
        fcntl.ioctl(self._uffd, _UFFDIO_REGISTER, bytearray(range_))
        self._libc = libc
        self._fd = os.open(Path(mountpoint, ".parked"), os.O_WRONLY | os.O_CREAT, 0o600)

    def run(self) -> None:
        """Write the page that nobody has filled yet."""
        self._libc.write(self._fd, ctypes.c_void_p(self._address), ctypes.c_size_t(mmap.PAGESIZE))

    def park(self) -> None:
        """Start, and wait until the kernel tells of the fault."""
        self.start()
        os.read(self._uffd, 32)

    def let_go(self) -> None:
        """Fill the page: the write goes on."""
        source = ctypes.create_string_buffer(mmap.PAGESIZE)
        copy = struct.pack("QQQQq", self._address, ctypes.addressof(source), mmap.PAGESIZE, 0, 0)
        fcntl.ioctl(self._uffd, _UFFDIO_COPY, bytearray(copy))
        self.join()
        os.close(self._fd)
        os.close(self._uffd)


def wait_for(condition: object, what: str, timeout_s: float = 30) -> None:
    """Look every few milliseconds; exit with a message when it takes too long."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():  # type: ignore[operator]
        if time.monotonic() > deadline_s:
            sys.exit(f"witness: gave up waiting until {what}")
        time.sleep(PERIOD_S)


def main_pid(unit: str) -> int:
    """The main process of a unit, from its cgroup: PID 1 is not asked for anything while its disk is frozen."""
    return int((CGROUPS / f"ballast-{unit}.service/cgroup.procs").read_text().split()[0])


def is_asleep_in_the_kernel(pid: int) -> bool:
    """Whether it sleeps uninterruptibly."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "D"


class Harm:
    """What can be done to the guest; ``do("VERB OBJECT")``."""

    def do(self, harm: str) -> None:
        """One harm."""
        verb, _, object_ = harm.partition(" ")
        getattr(self, verb.replace("-", "_"))(object_)

    def kill(self, unit: str) -> None:
        os.kill(main_pid(unit), signal.SIGKILL)

    def stop(self, unit: str) -> None:
        os.kill(main_pid(unit), signal.SIGSTOP)

    def resume(self, unit: str) -> None:
        os.kill(main_pid(unit), signal.SIGCONT)

    def oom(self, unit: str) -> None:
        """Have the kernel's OOM killer take it, even the guard, which is out of its reach otherwise."""
        limit = CGROUPS / f"ballast-{unit}.service/memory.max"
        process = Path(f"/proc/{main_pid(unit)}")
        (process / "oom_score_adj").write_text("0")
        with contextlib.suppress(OSError):
            limit.write_text(OOM_LIMIT)
        with contextlib.suppress(OSError):  # it is gone already
            wait_for(lambda: "\nState:\tZ" in (process / "status").read_text(), "the OOM killer came", 10)
        with contextlib.suppress(OSError):
            limit.write_text("max")

    def thaw(self, mountpoint: str) -> None:
        fd = os.open(mountpoint, os.O_RDONLY)
        fcntl.ioctl(fd, _FITHAW, 0)
        os.close(fd)

    def umount(self, mountpoint: str) -> None:
        """It is detached; what holds it open keeps the superblock. Without MNT_DETACH umount(2) says EBUSY."""
        if ctypes.CDLL(None, use_errno=True).umount2(mountpoint.encode(), _MNT_DETACH):
            raise OSError(ctypes.get_errno(), "umount2", mountpoint)

    def unplug(self, mountpoint: str) -> None:
        """The driver lets go of the disk, as when it is taken out; that may wait for the thaw."""
        mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
        name = next(Path(source).name for source, point, *_ in mounts if point == mountpoint)
        remove = Path(f"/sys/class/block/{name}/device").resolve().parent / "remove"
        threading.Thread(target=remove.write_text, args=("1",), daemon=True).start()
        wait_for(lambda: not Path(f"/sys/class/block/{name}").exists(), "the disk is gone", 10)

    def dirty(self, mountpoint: str) -> None:
        """Write, and have it written out by whoever has to, until its disk is thawed."""
        script = f"dd if=/dev/zero of={mountpoint}/dirty bs=64k count=64 conv=fsync; rm {mountpoint}/dirty"
        subprocess.Popen(["sh", "-c", script], start_new_session=True, stderr=subprocess.DEVNULL)

    def clock(self, seconds: str) -> None:
        time.clock_settime(time.CLOCK_REALTIME, time.time() + float(seconds))

    def await_pid1(self, _: str) -> None:
        """PID 1 waits for the frozen disk."""
        wait_for(lambda: is_asleep_in_the_kernel(1), "PID 1 waits for its disk", 10)

    def upgrade(self, _: str) -> None:
        """The other version of the packages comes."""
        subprocess.Popen(["sh", "-c", UPGRADE], start_new_session=True)


def arm_rescuer(mountpoints: list[str]) -> subprocess.Popen[bytes]:
    """Thaw everything after a while, from another process."""
    thaw = "; ".join(f"fsfreeze --unfreeze {point} 2>/dev/null" for point in mountpoints)
    return subprocess.Popen(["setsid", "sh", "-c", f"sleep {RESCUE_S}; {thaw}"])


def first_writes(writers: list[Writer], since_s: float) -> dict[str, float]:
    """Wait until every writer has come through once more; seconds from ``since_s`` to that, for each."""
    seen: dict[str, float] = {}

    def all_seen() -> bool:
        for writer in writers:
            if writer.last_s > since_s:
                seen.setdefault(writer.mountpoint, round(writer.last_s - since_s, 3))
        return len(seen) == len(writers)

    wait_for(all_seen, "all writers go on", RESCUE_S + 20)
    return seen


def watch(order: dict[str, list[str]]) -> dict[str, object]:
    """One freeze that somebody else begins, harmed; when it thawed."""
    mountpoints = order["mountpoints"]
    parked = ParkedWriter(mountpoints[-1]) if order["parked"] else None
    after_parked = Writer(mountpoints[-1])  # opened now: while the freeze waits, even that would
    if parked:
        parked.park()
        mountpoints = mountpoints[:-1]  # its file system never gets frozen whole, so it is not waited for
    writers = [Writer(point) for point in mountpoints]
    for writer in writers:
        writer.start()
    say("ready")
    wait_for(lambda: all(writer.is_held_up for writer in writers), "all is frozen")
    say("frozen")
    if not parked:
        wait_for(GO.exists, "the freeze was answered")
    harmed_s = time.monotonic()
    for one in order["harms"]:
        Harm().do(one)
    say("harmed")
    report: dict[str, object] = {"thawed_s": first_writes(writers, harmed_s)}
    if parked:
        let_go_s = time.monotonic()
        parked.let_go()
        after_parked.start()
        report["parked_thawed_s"] = first_writes([*writers, after_parked], let_go_s)
    for one in order["afterwards"]:
        Harm().do(one)
    return report


def say(word: str) -> None:
    """For the host to wait for."""
    sys.stdout.write(word + "\n")
    sys.stdout.flush()


def main() -> None:
    """Print what was seen."""
    order = json.loads(sys.argv[1])
    rescuer = arm_rescuer(order["mountpoints"])
    try:
        say(json.dumps(watch(order)))
    finally:
        os.killpg(rescuer.pid, signal.SIGKILL)


if __name__ == "__main__":
    main()
