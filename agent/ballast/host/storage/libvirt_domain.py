"""One machine of libvirt's: its own calls, each with a deadline, and what its XML says of disks.

libvirt 11.3: formatdomain.html, formatdomaincheckpoint.html, formatbackup.html. Nothing is changed behind its back.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit
from xml.etree import ElementTree

from ballast.host.machine import NotReclaimable
from ballast.host.storage.source import BackupFailed
from ballast.wire.errors import BadRequest, DeadlineExceeded

T = TypeVar("T")

# Longer than libvirt itself waits for its turn at a machine: 30 s.
CALL_S = 45.0
_JOB_END_S = 60.0
_LOOK_S = 0.02
_OWNER = re.compile(r"\+?(\d+):\+?(\d+)")


@dataclass(frozen=True, slots=True)
class LibvirtDisk:
    """A disk that the guest may write to; ``name`` is its target (``vda``), ``format`` its image's."""

    name: str
    format: str
    bytes: int
    used_bytes: int

    @property
    def keeps_bitmaps(self) -> bool:
        """Whether changes can be noted in its image."""
        return self.format == "qcow2"


@dataclass(frozen=True, slots=True)
class Job:
    """A backup that runs, ours or not: the UNIX socket at which it serves, None if it serves otherwise."""

    socket: Path | None


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """``changed_bytes`` since then, by the names of all disks that are in it; None if its bitmap is not whole."""

    name: str
    changed_bytes: dict[str, int | None]

    @property
    def is_whole(self) -> bool:
        """Whether an increment may rely on it."""
        return None not in self.changed_bytes.values()


class LibvirtDomain:
    """A machine, by libvirt's URI and its name: ``qemu:///system/web1``. Calls raise BackupFailed, DeadlineExceeded."""

    def __init__(self, target: str) -> None:
        self._uri, _, self.name = target.rpartition("/")
        if not self._uri or not self.name:
            raise BadRequest(f'{target}: expected libvirt\'s "URI/DOMAIN", as in "qemu:///system/web1"')
        if host := urlsplit(self._uri).netloc:
            raise BadRequest(f"{target}: backups are made on the machine's own host, which is {host}")
        self._connection: Any = None
        self._domain: Any = None

    async def close(self) -> None:
        """Let libvirt go; the next call connects anew."""
        connection, self._connection, self._domain = self._connection, None, None
        if connection is not None:
            with contextlib.suppress(BackupFailed, DeadlineExceeded):
                await self._run(connection.close)

    async def is_running(self) -> bool:
        """Whether it has a QEMU."""
        return bool(await self._call("isActive"))

    async def xml(self, *, inactive: bool = False) -> str:
        """Describe it as it runs, or as it would be started; without passwords."""
        return str(await self._call("XMLDesc", _library().VIR_DOMAIN_XML_INACTIVE if inactive else 0))

    async def is_persistent(self) -> bool:
        """Whether libvirt knows it when it is off."""
        return bool(await self._call("isPersistent"))

    async def owner(self) -> tuple[int, int] | None:
        """User and group as which its QEMU runs; None if libvirt does not change them."""
        labels = await self._call("securityLabelList")
        owners = [match for label, *_ in labels if (match := _OWNER.fullmatch(label))]
        return (int(owners[0][1]), int(owners[0][2])) if owners else None

    async def disks(self) -> list[LibvirtDisk]:
        """All that is written by the guest: nothing removable, nothing that is read only."""
        found = []
        for disk in ElementTree.fromstring(await self.xml()).iterfind("./devices/disk"):
            target, driver = disk.find("target"), disk.find("driver")
            if disk.get("device") not in ("disk", "lun") or disk.find("readonly") is not None or target is None:
                continue
            name = target.get("dev", "")
            bytes_, allocated, physical = await self._call("blockInfo", name)
            # What a disk is based on is not in these figures.
            is_based = disk.find("backingStore/source") is not None
            used_bytes = bytes_ if is_based else min(bytes_, max(allocated, physical))
            format_ = driver.get("type", "raw") if driver is not None else "raw"
            found.append(LibvirtDisk(name, format_, bytes_, used_bytes))
        return found

    async def checkpoints(self) -> list[Checkpoint]:
        """Tell of all checkpoints, each after those that it is based on."""
        flags = _library().VIR_DOMAIN_CHECKPOINT_LIST_TOPOLOGICAL
        return [await self._checkpoint(one) for one in await self._call("listAllCheckpoints", flags)]

    async def _checkpoint(self, one: Any) -> Checkpoint:
        library = _library()
        flags = library.VIR_DOMAIN_CHECKPOINT_XML_NO_DOMAIN
        if await self.is_running():
            flags |= library.VIR_DOMAIN_CHECKPOINT_XML_SIZE
        xml = ElementTree.fromstring(await self._run(one.getXMLDesc, flags))
        disks = (disk for disk in xml.iterfind("./disks/disk") if disk.get("checkpoint") == "bitmap")
        sizes = {disk.get("name", ""): disk.get("size") for disk in disks}
        return Checkpoint(one.getName(), {name: None if size is None else int(size) for name, size in sizes.items()})

    async def delete_checkpoint(self, name: str, *, metadata_only: bool = False) -> None:
        """Delete a checkpoint; what is noted in it goes to the one that it is based on, unless ``metadata_only``."""
        flags = _library().VIR_DOMAIN_CHECKPOINT_DELETE_METADATA_ONLY if metadata_only else 0
        checkpoint = await self._call("checkpointLookupByName", name)
        await self._run(checkpoint.delete, flags)

    async def job(self) -> Job | None:
        """Tell of the backup that runs."""
        if not await self.has_job():
            return None
        try:
            xml = ElementTree.fromstring(await self._call("backupGetXMLDesc"))
        except BackupFailed as error:
            if isinstance(error.__cause__, _library().libvirtError):
                return None  # another kind of job, or it is over
            raise
        server = xml.find("server")
        socket = server.get("socket") if server is not None else None
        return Job(Path(socket) if socket else None)

    async def has_job(self) -> bool:
        """Whether anything runs that keeps a backup from beginning."""
        if not await self.is_running():
            return False
        return bool((await self._call("jobInfo"))[0] != _library().VIR_DOMAIN_JOB_NONE)

    async def begin(self, backup_xml: str, checkpoint_xml: str | None, deadline_s: float) -> None:
        """Begin a backup whose scratch files are made, and a checkpoint at the same moment."""
        flags = _library().VIR_DOMAIN_BACKUP_BEGIN_REUSE_EXTERNAL
        await self._call("backupBegin", backup_xml, checkpoint_xml, flags, deadline_s=deadline_s)

    async def abort(self) -> None:
        """End the backup that runs, and wait until it is over."""
        await self._call("abortJob")
        deadline_s = time.monotonic() + _JOB_END_S
        while await self.has_job():
            if time.monotonic() > deadline_s:
                raise DeadlineExceeded(f"{self.name}: the backup has not ended for {_JOB_END_S:g} s")
            await asyncio.sleep(_LOOK_S)

    async def _call(self, name: str, *arguments: Any, deadline_s: float = CALL_S) -> Any:
        if self._domain is None:
            self._connection, self._domain = await self._run(self._connect)
        return await self._run(getattr(self._domain, name), *arguments, deadline_s=deadline_s)

    def _connect(self) -> tuple[Any, Any]:
        connection = _library().open(self._uri)
        return connection, connection.lookupByName(self.name)

    async def _run(self, call: Callable[..., T], *arguments: Any, deadline_s: float = CALL_S) -> T:
        """Call libvirt, which blocks; who is cancelled meanwhile goes only when the call is over."""
        library = _library()
        running = asyncio.wrap_future(_in_thread(call, *arguments))
        try:
            done, _ = await asyncio.wait({running}, timeout=deadline_s)
        except asyncio.CancelledError:
            await asyncio.wait({running}, timeout=deadline_s)
            raise
        if not done:
            raise DeadlineExceeded(f"{self.name}: libvirt has not answered for {deadline_s:g} s")
        try:
            return running.result()
        except library.libvirtError as error:
            raise BackupFailed(f"{self.name}: libvirt: {error.get_error_message() or error}") from error


def _in_thread(call: Callable[..., T], *arguments: Any) -> Future[T]:
    """Not a thread of asyncio's: a libvirt that never answers would keep the program from ending."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            result = call(*arguments)
        except BaseException as error:  # noqa: BLE001 - handed over to whoever awaits the future
            future.set_exception(error)
        else:
            future.set_result(result)

    future.set_running_or_notify_cancel()
    threading.Thread(target=run, name="libvirt", daemon=True).start()
    return future


def _library() -> Any:
    try:
        import libvirt
    except ImportError as error:
        raise NotReclaimable(
            "this needs the Python library libvirt (package python3-libvirt), which is not installed"
        ) from error
    # It would print every error, also those that are expected.
    libvirt.registerErrorHandler(_ignore, None)
    return libvirt


def _ignore(_context: object, _error: Sequence[object]) -> None:
    pass
