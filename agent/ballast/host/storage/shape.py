"""The least that a machine needs to boot from its disks, told alike of plain QEMU and of libvirt: ``shape.json``.

Network, displays and what else it has are in the command line or the XML beside it, and not here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from xml.etree import ElementTree

from ballast.host.qmp import Qmp
from ballast.host.storage.qemu_disks import QemuDisk, is_flash
from ballast.host.storage.source import BackupFailed
from ballast.wire.errors import BadRequest
from ballast.wire.shape import read_record, to_wire

Bus = Literal["virtio", "scsi", "ide", "nvme"]

SHAPE_FILE = "shape.json"

# QOM types of devices with a disk. Others, as USB, are tried as virtio.
_BUSES: dict[str, Bus] = {"scsi-hd": "scsi", "scsi-block": "scsi", "ide-hd": "ide", "nvme": "nvme", "nvme-ns": "nvme"}
_LIBVIRT_BUSES: dict[str, Bus] = {"scsi": "scsi", "sata": "ide", "ide": "ide", "nvme": "nvme"}


@dataclass(frozen=True, slots=True)
class DiskShape:
    """A disk by its name in the backup, and how the guest sees it."""

    name: str
    bus: Bus
    serial: str | None = None


@dataclass(frozen=True, slots=True)
class Shape:
    """``machine_type`` has its version. ``firmware`` is UEFI's code; ``kernel`` and what follows are of a direct boot.

    Paths are absolute, on the host where the machine ran. ``disks`` are in the guest's order.
    """

    machine_type: str
    is_accelerated: bool
    memory_bytes: int
    disks: list[DiskShape]
    firmware: str | None = None
    kernel: str | None = None
    initrd: str | None = None
    append: str | None = None


def write_shape(folder: Path, shape: Shape) -> None:
    """Keep it. OSError."""
    (folder / SHAPE_FILE).write_text(json.dumps(to_wire(shape), indent=2) + "\n")


def read_shape(folder: Path) -> Shape:
    """What was kept. BackupFailed if nothing was, or something else."""
    path = folder / SHAPE_FILE
    try:
        return read_record(Shape, json.loads(path.read_text()), where=str(path))
    except FileNotFoundError as error:
        raise BackupFailed(f"{path} is not there: the backup is older than booting on trial") from error
    except (OSError, ValueError, BadRequest) as error:
        raise BackupFailed(f"{path} cannot be read: {error}") from error


async def shape_of_qemu(qmp: Qmp, disks: Sequence[QemuDisk], working_directory: str) -> Shape:
    """Ask QEMU. QmpFailed."""

    async def property_of(path: str, name: str) -> Any:
        return await qmp.run("qom-get", path=path, property=name)

    async def file_of(name: str) -> str | None:
        return _file(Path(working_directory, await property_of("/machine", name)))

    flash = [block["inserted"] for block in await qmp.run("query-block") if is_flash(block) and block.get("inserted")]
    code = next((str(Path(working_directory, one["file"])) for one in flash if one["ro"]), None)
    return Shape(
        machine_type=(await property_of("/machine", "type")).removesuffix("-machine"),
        is_accelerated=(await qmp.run("query-kvm"))["enabled"],
        memory_bytes=(await qmp.run("query-memory-size-summary"))["base-memory"],
        disks=[await _disk_shape(qmp, disk) for disk in disks],
        firmware=code or await file_of("firmware"),
        kernel=await file_of("kernel"),
        initrd=await file_of("initrd"),
        append=await property_of("/machine", "append") or None,
    )


def _file(path: Path) -> str | None:
    """None also for QEMU's own firmware, which it names without a path."""
    return str(path) if path.is_file() else None


async def _disk_shape(qmp: Qmp, disk: QemuDisk) -> DiskShape:
    path = disk.qdev if disk.qdev.startswith("/") else f"/machine/peripheral/{disk.qdev}"
    properties = {one["name"] for one in await qmp.run("qom-list", path=path)}
    type_ = await qmp.run("qom-get", path=path, property="type")
    serial = await qmp.run("qom-get", path=path, property="serial") if "serial" in properties else None
    return DiskShape(disk.name, _BUSES.get(type_, "virtio"), serial or None)


def shape_of_libvirt(xml: ElementTree.Element, disks: Sequence[str]) -> Shape:
    """Read a running machine's XML (formatdomain.html), in which all defaults are written out."""
    os_type = xml.find("./os/type")
    loader = xml.find("./os/loader")
    return Shape(
        machine_type=os_type.get("machine", "q35") if os_type is not None else "q35",
        is_accelerated=xml.get("type") == "kvm",
        memory_bytes=int(xml.findtext("memory", "0")) << 10,
        disks=[shape for shape in _libvirt_disks(xml) if shape.name in disks],
        firmware=None if loader is None else loader.text,
        kernel=xml.findtext("./os/kernel"),
        initrd=xml.findtext("./os/initrd"),
        append=xml.findtext("./os/cmdline"),
    )


def _libvirt_disks(xml: ElementTree.Element) -> Iterator[DiskShape]:
    for disk in xml.iterfind("./devices/disk"):
        if (target := disk.find("target")) is not None:
            bus = _LIBVIRT_BUSES.get(target.get("bus", ""), "virtio")
            yield DiskShape(target.get("dev", ""), bus, disk.findtext("serial"))
