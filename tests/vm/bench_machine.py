"""The guest of the memory benchmarks: it has our agent, and its peers' devices, virtio-balloon and virtio-mem.

What one contender does is timed while the others rest: our agent is stopped unless it is its turn.
"""

from __future__ import annotations

import contextlib
import dataclasses
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path

from ballast.guest import config
from ballast.host import linux
from ballast.host.agent import Agent
from tests.lab.guest import Guest
from tests.lab.image import build
from tests.vm.conftest import DIST, packages

MIB, GIB = 1 << 20, 1 << 30
BLOCK_BYTES = 128 * MIB
MAX_BYTES = 16 * GIB  # boot memory, virtio-mem's and a DIMM of 64 blocks
VIRTIO_MEM_BYTES = GIB
TIMEOUT_S = 120.0
LOOK_EVERY_S = 0.005
WATCH = "/run/bench-watch.py"
_DEVICE = "/machine/peripheral/virtio-mem"
_CONFIGURATION = "/etc/ballast/agent.d/bench.toml"
# All that is free is written and free again, but for what Linux keeps free by itself.
_TOUCH = """
import mmap, re
free_bytes = 1024 * int(re.search("MemFree: *([0-9]+)", open("/proc/meminfo").read())[1])
memory = mmap.mmap(-1, free_bytes - (80 << 20), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
memory.madvise(23)  # MADV_POPULATE_WRITE
"""


class BenchFailed(Exception):
    """A contender did not do what it was told."""


def wait(is_so: Callable[[], bool]) -> None:
    """Look again and again; BenchFailed if it takes too long."""
    deadline_s = time.monotonic() + TIMEOUT_S
    while not is_so():
        if time.monotonic() > deadline_s:
            raise BenchFailed("it does not come about")
        time.sleep(LOOK_EVERY_S)


@contextlib.contextmanager
def boot(memory_bytes: int, folder: Path = DIST) -> Iterator[Machine]:
    """A guest with that much boot memory and all contenders, ours from that folder; none does anything yet."""
    memory = f"memory-backend-memfd,id=virtio-mem-ram,size={VIRTIO_MEM_BYTES},share=on,reserve=off"
    devices = [
        *("-m", f"maxmem={MAX_BYTES}B"),
        *("-device", "virtio-balloon-pci,id=virtio-balloon"),
        *("-object", memory, "-device", "virtio-mem-pci,id=virtio-mem,memdev=virtio-mem-ram,requested-size=0"),
    ]
    # Without vsock: its user-space device would have to be vouched for, and there would be room for few DIMMs.
    disks = [("ext4", 512 * MIB)]
    with Guest(build("trixie"), disks=disks, memory_bytes=memory_bytes, vsock=False, arguments=devices) as guest:
        guest.wait_boot()
        # Beside virtio-balloon ours stays empty unless it is told otherwise.
        if "balloon" in {one.name for one in dataclasses.fields(config.Memory)}:
            guest.put(_CONFIGURATION, b'[memory]\nballoon = "always"\n')
        guest.install(packages(folder))
        guest.put(WATCH, Path(__file__).with_name("bench_watch.py").read_bytes())
        machine = Machine(guest)
        machine.stop_agent()
        yield machine


class Machine:
    """A guest, and what can be told to it and its devices."""

    def __init__(self, guest: Guest) -> None:
        self.guest = guest
        with socket.socket(socket.AF_UNIX) as monitor:
            monitor.connect(str(guest.qmp_path))
            self._pid = linux.peer_pid(monitor)

    # In the guest

    def start_agent(self) -> None:
        """Our turn begins."""
        self.guest.run("systemctl reset-failed ballast-agent; systemctl start ballast-agent", timeout_s=60)

    def stop_agent(self) -> None:
        """Our turn is over."""
        self.guest.run("systemctl stop ballast-agent", timeout_s=60)

    def let_kernel(self, policy: str) -> None:
        """What the kernel itself does with new memory: "offline", or "online_movable"."""
        self.guest.run(f"echo {policy} >/sys/devices/system/memory/auto_online_blocks")

    def touch(self) -> None:
        """Have a program write all memory that is free, and end: the host has given it, and the guest needs it not."""
        self.guest.run(["/usr/bin/python3", "-IBc", _TOUCH], timeout_s=TIMEOUT_S)

    # Devices of its peers

    def size_bytes(self) -> int:
        """Ask QEMU for the guest's size: all of its memory, without what virtio-balloon holds."""
        return int(self.guest.qmp("query-balloon")["actual"])

    def order_balloon(self, size_bytes: int) -> None:
        """Have virtio-balloon make the guest that large, and wait until it is."""
        is_falling = size_bytes < self.size_bytes()
        self.guest.qmp("balloon", value=size_bytes)
        wait(lambda: self.size_bytes() <= size_bytes if is_falling else self.size_bytes() >= size_bytes)

    def request_virtio_mem(self, bytes_: int) -> None:
        """Have virtio-mem plug or unplug until so much is plugged, and wait until it is."""
        self.guest.qmp("qom-set", path=_DEVICE, property="requested-size", value=bytes_)
        wait(lambda: bool(self.guest.qmp("qom-get", path=_DEVICE, property="size") == bytes_))

    # On the host

    def files(self) -> dict[int, int]:
        """How much of each file that backs the guest's memory is in use, in bytes, by its inode."""
        used = {}
        for one in linux.read_maps(self._pid):
            if "memfd:memory-backend" in one.path:
                with contextlib.suppress(FileNotFoundError):  # of a DIMM that goes this moment
                    file = Path(f"/proc/{self._pid}/map_files/{one.start:x}-{one.end:x}")
                    used[one.inode] = 512 * file.stat().st_blocks
        return used

    def used_bytes(self) -> int:
        """What all of the guest's memory takes on this host."""
        return sum(self.files().values())

    def agent(self) -> AbstractAsyncContextManager[Agent]:
        """A connection to the agent."""
        return Agent.connect(f"unix:{self.guest.ballast_port}", timeout_s=TIMEOUT_S)
