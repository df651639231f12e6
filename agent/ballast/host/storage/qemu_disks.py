"""The disks of a running QEMU, and the bitmaps in which it notes what changed: read by QMP, changed nowhere here.

QMP as of QEMU 10.0 (qapi/block-core.json): query-block, query-blockstats, query-named-block-nodes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ballast.host.machine import QmpFailed
from ballast.host.qmp import Qmp
from ballast.host.storage.source import PREFIX

_UNFIT = re.compile(r"[^A-Za-z0-9._-]+")


@dataclass(frozen=True, slots=True)
class Bitmap:
    """Notes of what changed since a backup: ``changed_bytes`` so far."""

    name: str
    changed_bytes: int
    is_recording: bool
    is_busy: bool
    is_inconsistent: bool

    @property
    def is_whole(self) -> bool:
        """Whether an increment may rely on it."""
        return self.is_recording and not self.is_busy and not self.is_inconsistent


@dataclass(frozen=True, slots=True)
class QemuDisk:
    """A disk of the guest's: ``qdev`` is its device, ``node`` what the device had before any of our nodes came."""

    name: str
    qdev: str
    root: str
    node: str
    bytes: int
    used_bytes: int
    keeps_bitmaps: bool
    bitmaps: Mapping[str, Bitmap] = field(default_factory=dict)


async def read_disks(qmp: Qmp) -> list[QemuDisk]:
    """All that is written by the guest: no drives of removable media, no firmware. QmpFailed."""
    try:
        chains = {stats["qdev"]: _chain(stats) for stats in await qmp.run("query-blockstats") if "qdev" in stats}
        nodes = {node["node-name"]: node for node in await qmp.run("query-named-block-nodes", flat=True)}
        disks = [
            _disk(block, chains[block["qdev"]], nodes) for block in await qmp.run("query-block") if _is_disk(block)
        ]
    except (KeyError, TypeError) as error:
        raise QmpFailed(f"QEMU described its disks in a form that we do not know: {error!r}") from error
    names = [disk.name for disk in disks]
    if twice := {name for name in names if names.count(name) > 1}:
        raise QmpFailed(f"two disks are named {', '.join(sorted(twice))}; give the devices ids of their own")
    return disks


def _chain(stats: Mapping[str, Any]) -> list[str]:
    """Names of the nodes below a device, each the ``file`` of the one before."""
    names = [stats["node-name"]]
    while parent := stats.get("parent"):
        stats = parent
        names.append(stats["node-name"])
    return names


def _is_disk(block: Mapping[str, Any]) -> bool:
    inserted = block.get("inserted")
    return bool(inserted and "qdev" in block and not block["removable"] and not inserted["ro"] and not is_flash(block))


def is_flash(block: Mapping[str, Any]) -> bool:
    """Whether it holds the firmware or its variables. By the device: a drive has a name there, a node has none."""
    return str(block.get("qdev", "")).startswith("/machine/system.flash")


def _disk(block: Mapping[str, Any], chain: Sequence[str], nodes: Mapping[str, Any]) -> QemuDisk:
    node = next(name for name in chain if not name.startswith(PREFIX))
    image = nodes[node]["image"]
    specific = image.get("format-specific", {}).get("data", {})
    bitmaps = [_bitmap(one) for one in nodes[node].get("dirty-bitmaps", ()) if "name" in one]
    return QemuDisk(
        name=_name(block, node),
        qdev=block["qdev"],
        root=chain[0],
        node=node,
        bytes=image["virtual-size"],
        used_bytes=min(image["virtual-size"], sum(one.get("actual-size", 0) for one in _images(image))),
        keeps_bitmaps=image["format"] == "qcow2" and specific.get("compat") == "1.1",
        bitmaps={bitmap.name: bitmap for bitmap in bitmaps if bitmap.name.startswith(PREFIX)},
    )


def _name(block: Mapping[str, Any], node: str) -> str:
    """The one that the machine's owner gave: of the drive, of the device or of the node; else the device's place."""
    parts = block["qdev"].removesuffix("/virtio-backend").split("/")
    is_own = len(parts) == 1 or parts[-2] == "peripheral"
    own = block["device"] or (parts[-1] if is_own else "") or ("" if node.startswith("#") else node)
    return _UNFIT.sub("-", own or parts[-1]).strip("-.")


def _images(image: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    while image:
        yield image
        image = image.get("backing-image")


def _bitmap(one: Mapping[str, Any]) -> Bitmap:
    return Bitmap(one["name"], one["count"], one["recording"], one["busy"], one.get("inconsistent", False))
