"""The nodes that a backup puts between QEMU's devices and their disks, and their way out again.

    device -> seat (raw) -> disk                              before the cut
    device -> seat (raw) -> copy-before-write -> disk         after it
                                              -> old blocks (a local image)
    NBD export -> cut (snapshot-access) -> copy-before-write

The seats are there because ``blockdev-reopen`` changes the files of many nodes at one moment, all or none, with every
disk at rest: no transaction of QEMU's can put a copy-before-write node in (QEMU 10.0, qapi/transaction.json). When
the old blocks cannot be kept within the time-out the snapshot breaks, and the guest's write goes on.

Everything has a name of ours and is found again by it: to take it away nothing needs to be remembered.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ballast.host.machine import QmpFailed
from ballast.host.qmp import Qmp
from ballast.host.storage.qemu_disks import QemuDisk, read_disks
from ballast.host.storage.source import PREFIX, Export, NotRepairable
from ballast.wire.errors import Busy

# QEMU's names of nodes have at most 31 characters: a number, not the disk's name.
SEAT, COPY, OLD, CUT = (f"{PREFIX}{kind}-" for kind in ("seat", "copy", "old", "cut"))
EXPORT = f"{PREFIX}export-"
_LEAVE_S = 10.0
_LOOK_S = 0.05


async def put_in(qmp: Qmp, number: int, disk: QemuDisk, old_blocks: Path, timeout_s: int) -> None:
    """Seat the device, and make ready what ``cut`` puts below the seat. QmpFailed."""
    file = {"driver": "file", "filename": str(old_blocks)}
    await qmp.run("blockdev-add", driver="qcow2", node_name=f"{OLD}{number}", discard="unmap", file=file)
    await qmp.run("blockdev-add", **_seat(number, disk.node))
    await qmp.run("qom-set", path=disk.qdev, property="drive", value=f"{SEAT}{number}")
    await qmp.run(
        "blockdev-add",
        driver="copy-before-write",
        node_name=f"{COPY}{number}",
        file=disk.node,
        target=f"{OLD}{number}",
        discard="unmap",
        on_cbw_error="break-snapshot",
        cbw_timeout=timeout_s,
    )


async def cut(qmp: Qmp, count: int) -> None:
    """From now on keep what the guest overwrites, on all disks at one moment. QmpFailed: on none."""
    await qmp.run("blockdev-reopen", options=[_seat(number, f"{COPY}{number}") for number in range(count)])


def _seat(number: int, file: str) -> dict[str, Any]:
    # Without it what the guest discards would stop at the seat.
    return {"driver": "raw", "node-name": f"{SEAT}{number}", "file": file, "discard": "unmap"}


async def export(qmp: Qmp, disks: Sequence[QemuDisk], socket: Path, bitmap: str | None) -> list[Export]:
    """Serve all disks as they were at the cut. Busy if QEMU's one NBD server is somebody else's; QmpFailed."""
    try:
        await qmp.run("nbd-server-start", addr={"type": "unix", "data": {"path": str(socket)}})
    except QmpFailed as error:
        raise Busy(f"the machine serves disks by NBD already, and it can do so only once: {error.desc}") from error
    for number, disk in enumerate(disks):
        await qmp.run("blockdev-add", driver="snapshot-access", node_name=f"{CUT}{number}", file=f"{COPY}{number}")
        bitmaps = {"bitmaps": [{"node": disk.node, "name": bitmap}]} if bitmap else {}
        await qmp.run(
            "block-export-add",
            **{"type": "nbd", "id": f"{EXPORT}{number}", "node-name": f"{CUT}{number}", "name": disk.name, **bitmaps},
        )
    context = f"qemu:dirty-bitmap:{bitmap}" if bitmap else None
    return [Export(disk.name, socket, disk.name, context) for disk in disks]


async def take_out(qmp: Qmp) -> int:
    """Give all devices their disks back, and take away every node and export of ours.

    Returns how many nodes there were. NotRepairable, QmpFailed: what was not reached is left as it was.
    """
    nodes = [node["node-name"] for node in await qmp.run("query-named-block-nodes", flat=True)]
    ours = [name for name in nodes if name.startswith(PREFIX)]
    if ours:
        await _stop_serving(qmp)
    for name in ours:
        if name.startswith(CUT):
            await qmp.run("blockdev-del", node_name=name)
    seated = [disk for disk in await read_disks(qmp) if disk.root.startswith(SEAT)]
    if seated:
        await qmp.run("blockdev-reopen", options=[_seat(_number(disk.root), disk.node) for disk in seated])
    for disk in seated:
        await qmp.run("qom-set", path=disk.qdev, property="drive", value=disk.node)
    for kind, name in itertools.product((SEAT, COPY, OLD), ours):
        if name.startswith(kind):
            await qmp.run("blockdev-del", node_name=name)
    return len(ours)


def _number(node: str) -> int:
    return int(node.removeprefix(SEAT))


async def _stop_serving(qmp: Qmp) -> None:
    """End our exports, and the server if it has no others."""
    for export_ in await _exports(qmp):
        if export_.startswith(EXPORT):
            with contextlib.suppress(QmpFailed):  # it is on its way out already
                await qmp.run("block-export-del", id=export_, mode="hard")
    deadline_s = time.monotonic() + _LEAVE_S
    while ours := [name for name in await _exports(qmp) if name.startswith(EXPORT)]:
        if time.monotonic() > deadline_s:
            raise NotRepairable(f"QEMU does not end its NBD exports {', '.join(ours)} within {_LEAVE_S:g} s")
        await asyncio.sleep(_LOOK_S)
    if not await _exports(qmp):
        with contextlib.suppress(QmpFailed):  # it does not run: the tool was killed before it did
            await qmp.run("nbd-server-stop")


async def _exports(qmp: Qmp) -> list[str]:
    return [export_["id"] for export_ in await qmp.run("query-block-exports")]
