"""Look at the file systems of disks, in libguestfs's machine: python -m ballast.host.storage.appliance SOCKET...

A guest's file system may have been made to harm who mounts it, so no kernel but that machine's ever does. A program of
its own, because libguestfs blocks, and ends its machine when its program is gone. Prints one JSON object a line:
``{"ready": true}``, then one for each file system as it is found, as ``filesystems`` reads it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

NOT_INSTALLED = 3

# "Clean" is told after one mount, which replays the journal, and frees what was deleted while it was open.
_CHECKS = {
    "ext2": "e2fsck -fn",
    "ext3": "e2fsck -fn",
    "ext4": "e2fsck -fn",
    "xfs": "xfs_repair -n",
    "btrfs": "btrfs check --readonly",
}
_PASSED_OVER = {"swap", "unknown"}
_SAID_CHARS = 300


def look(sockets: Sequence[str]) -> None:
    """Attach the disks that NBD servers have at these sockets, in this order, and look at what is on all of them."""
    import guestfs

    machine = guestfs.GuestFS(python_return_dict=True)
    machine.set_backend("direct")  # another one may run it as a user who cannot reach the sockets
    for socket in sockets:
        # Read-only for us: libguestfs puts a throw-away overlay on it.
        machine.add_drive_opts("", readonly=1, format="raw", protocol="nbd", server=[f"unix:{socket}"])
    machine.launch()
    _tell({"ready": True})
    for device, type_ in machine.list_filesystems().items():
        if type_ not in _PASSED_OVER:
            disk, partition = _place(machine, device)
            about = {"disk": disk, "partition": partition, "device": device, "type": type_}
            _tell(about | _judge(machine, device, type_))
    machine.shutdown()


def _place(machine: Any, device: str) -> tuple[int | None, int | None]:
    """Which disk, and which partition of it; None: of several disks perhaps (LVM, MD), or no partition."""
    try:
        if device in machine.list_partitions():
            return machine.device_index(machine.part_to_dev(device)), machine.part_to_partnum(device)
        return machine.device_index(device), None
    except RuntimeError:
        return None, None


def _judge(machine: Any, device: str, type_: str) -> dict[str, str | None]:
    check = _CHECKS.get(type_)
    if check is None:
        return {"wrong": None, "skipped": f"nobody here checks {type_}"}
    try:
        machine.mount(device, "/")
        machine.umount("/")
        # Or the check may read what the device's page cache has from before: btrfs's found no Btrfs once in twelve.
        machine.blockdev_flushbufs(device)
        # Its own calls of these repair, or tell nothing of what is wrong.
        machine.debug("sh", [*check.split(), device])
    except RuntimeError as error:
        return {"wrong": f"{check.split()[0]}: {str(error)[-_SAID_CHARS:]}", "skipped": None}
    return {"wrong": None, "skipped": None}


def _tell(about: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(about) + "\n")
    sys.stdout.flush()


def main() -> int:
    """Run as a program."""
    try:
        look(sys.argv[1:])
    except ModuleNotFoundError:
        return NOT_INSTALLED
    except RuntimeError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
