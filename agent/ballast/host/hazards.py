"""What must not be when a host punches holes into a guest's memory: others who hold on to pages of it.

A device that has pinned pages (VFIO, vDPA, RDMA) goes on writing to the page that was punched out, while the guest has
a new one. QEMU's own balloon is switched off by all of these (ram_block_discard_disable), and a hole from outside
goes past that.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from ballast.host.machine import NotReclaimable
from ballast.host.monitor import Object, parse_net_clients, parse_objects
from ballast.host.qmp import Qmp

_PINNING = ("vfio", "vdpa", "rdma", "iommufd")
_CONFIDENTIAL = ("sev-", "tdx-", "sgx-")
# query-status: its memory is being read or written by a migration or a snapshot.
_MOVING_STATES = frozenset({"inmigrate", "postmigrate", "finish-migrate", "save-vm", "restore-vm", "colo"})
_MIGRATION_OVER = frozenset({"none", "completed", "failed", "cancelled"})
# They rely on pages staying where they are, as soon as they are used (migration/, QEMU 10.0).
_BARRING_CAPABILITIES = frozenset(
    {"background-snapshot", "postcopy-ram", "rdma-pin-all", "zero-copy-send", "x-colo", "release-ram"}
)


async def check_hazards(qmp: Qmp, safe_vhost_user: Collection[str]) -> None:
    """Raise NotReclaimable with the first reason not to punch this machine now; ``safe_vhost_user`` are ids."""
    check_devices(parse_objects(await qmp.ask_monitor("info qom-tree")), safe_vhost_user)
    check_devices(parse_objects(await qmp.ask_monitor("info qom-tree /objects")), safe_vhost_user)
    check_network(parse_net_clients(await qmp.ask_monitor("info network")), safe_vhost_user)
    guarded = await qmp.run("qom-get", path="/machine", property="confidential-guest-support")
    if guarded:
        raise NotReclaimable(f"the guest is a confidential one ({guarded}): its memory cannot be read as zero")
    await _check_migration(qmp)


def check_devices(objects: Sequence[Object], safe_vhost_user: Collection[str]) -> None:
    """Devices and back ends that keep pages, by their types."""
    for one in objects:
        if any(word in one.type for word in _PINNING):
            raise NotReclaimable(f"{_id(one)} ({one.type}) may have pinned all of the guest's memory")
        if one.path.startswith("/objects/") and one.type.startswith(_CONFIDENTIAL):
            raise NotReclaimable(f"{_id(one)} ({one.type}): memory of a confidential guest cannot be given back")
        if "vhost-user" in one.type and _id(one) not in safe_vhost_user:
            raise NotReclaimable(_vhost_user_reason(_id(one), one.type))


def check_network(clients: Sequence[tuple[str, str]], safe_vhost_user: Collection[str]) -> None:
    """The host's ends of network cards, which are no objects."""
    for name, kind in clients:
        if kind == "vhost-vdpa":
            raise NotReclaimable(f"{name} ({kind}) has pinned all of the guest's memory")
        if kind == "vhost-user" and name not in safe_vhost_user:
            raise NotReclaimable(_vhost_user_reason(name, kind))


def _vhost_user_reason(name: str, kind: str) -> str:
    return (
        f"{name} ({kind}) is served by another process, which may have pinned memory; if it has not, "
        f"list it as safe: --safe-vhost-user {name}, or safe-vhost-user in host.toml"
    )


def _id(one: Object) -> str:
    """The id that a device or back end was given, or its path."""
    parts = one.path.split("/")
    for folder in ("peripheral", "peripheral-anon", "objects"):
        if folder in parts[:-1]:
            return parts[parts.index(folder) + 1]
    return one.path


async def _check_migration(qmp: Qmp) -> None:
    state = (await qmp.run("query-status"))["status"]
    if state in _MOVING_STATES:
        raise NotReclaimable(f"the machine is in the state {state}: its memory is on the move")
    migration = (await qmp.run("query-migrate")).get("status", "none")
    if migration not in _MIGRATION_OVER:
        raise NotReclaimable(f"a migration or memory snapshot is under way ({migration})")
    for one in await qmp.run("query-migrate-capabilities"):
        if one["state"] and one["capability"] in _BARRING_CAPABILITIES:
            raise NotReclaimable(f"the migration capability {one['capability']} is on, which bars giving memory back")
