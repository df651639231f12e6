"""A QEMU on this host: where the guest's memory is, proven in two ways, and whether it may be punched.

QEMU says where in its own address space a guest-physical address is (``physical``), and the kernel's table of mappings
which part of which file is there. Both must agree with QEMU's list of RAM blocks and with the file.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator, Collection, Sequence
from typing import TYPE_CHECKING, Self

from ballast.host import linux
from ballast.host.hazards import check_hazards
from ballast.host.linux import Mapping
from ballast.host.machine import MemoryMap, NotReclaimable, QmpFailed, Region
from ballast.host.monitor import RamBlock, parse_ram_blocks
from ballast.host.physical import Physical, Run
from ballast.host.qmp import Qmp

if TYPE_CHECKING:
    from qemu.qmp import EventListener

# After any of these the guest's memory is no longer what the agent spoke of. Loading a snapshot is STOP and RESUME.
_UPHEAVALS = ("RESET", "SHUTDOWN", "STOP", "RESUME", "GUEST_PANICKED")
# Below it a lock is a buffer of a library's.
_PINNED_BYTES = 16 << 20


class Qemu:
    """A running QEMU; made by ``connect``. It holds the files of the guest's memory open."""

    def __init__(self, qmp: Qmp, safe_vhost_user: Collection[str], listener: EventListener) -> None:
        self.qmp = qmp
        self._safe_vhost_user = safe_vhost_user
        self._listener = listener
        self._fds: dict[tuple[int, int], int] = {}
        self._blocks: list[RamBlock] = []
        self._runs: list[Run] = []

    @classmethod
    @contextlib.asynccontextmanager
    async def connect(cls, qmp: str, safe_vhost_user: Collection[str] = ()) -> AsyncIterator[Self]:
        """Connect to QEMU's own QMP socket, PATH or ``unix:PATH``. PeerGone, NoAnswer, NotReclaimable."""
        async with Qmp.connect(qmp) as connection:
            with connection.listening(_UPHEAVALS) as listener:
                machine = cls(connection, safe_vhost_user, listener)
                try:
                    yield machine
                finally:
                    for fd in machine._fds.values():
                        os.close(fd)

    async def upheavals(self) -> list[str]:
        """Whatever befell the guest's memory since this was last asked: names of QMP's events."""
        await self.qmp.run("query-status")  # with its answer all events before it are here
        return [str(event["event"]) for event in self._listener.clear()]

    async def memory(self) -> MemoryMap:
        """The guest's memory as it is now, if nothing speaks against punching it. NotReclaimable, QmpFailed."""
        try:
            await check_hazards(self.qmp, self._safe_vhost_user)
            self._check_pins()
            await self._find_runs()
        except ValueError as error:
            raise QmpFailed(f"cannot read what QEMU says of itself: {error}") from error
        return self._read_map()

    def _check_pins(self) -> None:
        try:
            pinned_bytes = linux.pinned_bytes(self.qmp.pid)
        except OSError as error:
            raise NotReclaimable(f"cannot see process {self.qmp.pid}: {error.strerror}") from error
        if pinned_bytes >= _PINNED_BYTES:
            raise NotReclaimable(f"QEMU has pinned {pinned_bytes >> 20} MiB: mem-lock=on, or a device's doing")

    async def _find_runs(self) -> None:
        """Find all RAM, or see that it still is where it was: no block came or went, and none has moved."""
        blocks = parse_ram_blocks(await self.qmp.ask_monitor("info ramblock"))
        physical = Physical(self.qmp, blocks)
        if blocks != self._blocks or not all([await physical.holds(run) for run in self._runs]):
            self._blocks = []
            self._runs = await physical.runs()
            self._blocks = blocks

    def _read_map(self) -> MemoryMap:
        try:
            mappings = linux.read_maps(self.qmp.pid)
        except OSError as error:
            raise NotReclaimable(f"cannot see the memory of process {self.qmp.pid}: {error.strerror}") from error
        return MemoryMap([self._region(run, mappings) for run in self._runs])

    def _region(self, run: Run, mappings: Sequence[Mapping]) -> Region:
        block = run.block
        mapping = next((m for m in mappings if m.start <= run.host_address < m.end), None)
        if mapping is None:
            raise NotReclaimable(
                f"process {self.qmp.pid}, which opened {self.qmp.path}, is not QEMU: {block.name} is not in its memory"
            )
        if not mapping.is_shared:
            raise NotReclaimable(
                f"the memory {block.name} is private (share=off); it needs memory-backend-memfd,share=on"
            )
        if run.host_address + run.bytes > mapping.end:
            raise QmpFailed(f"{block.name} is mapped in more than one piece")
        if run.host_address - mapping.start + mapping.offset != run.offset:
            raise QmpFailed(f"{block.name} does not begin where its file does")
        return Region(run.address, run.bytes, self._open(mapping, block), run.offset, block.name)

    def _open(self, mapping: Mapping, block: RamBlock) -> int:
        key = (mapping.device, mapping.inode)
        if key not in self._fds:
            try:
                self._fds[key] = linux.open_mapped(self.qmp.pid, mapping)
            except OSError as error:
                raise NotReclaimable(f"cannot open the memory {block.name}: {error.strerror}") from error
        fd = self._fds[key]
        about = os.fstat(fd)
        if (about.st_dev, about.st_ino) != key or about.st_size < block.bytes:
            raise QmpFailed(f"the file of {block.name} is not the one that is mapped")
        if linux.filesystem_magic(fd) != linux.TMPFS_MAGIC:
            raise NotReclaimable(
                f"the memory {block.name} is a file on no tmpfs ({mapping.path}); it needs memory-backend-memfd "
                "without huge pages of hugetlbfs, or a file in /dev/shm"
            )
        return fd
