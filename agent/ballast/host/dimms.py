"""DIMMs: put into a running guest and taken out again, by QEMU and the guest's agent together.

A DIMM goes whole: the guest empties all of its blocks, or none is left offline. Nothing of it is punched: QEMU frees
all of its memory when it is out.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ballast.host.agent import Agent
from ballast.host.machine import NotReclaimable, QmpFailed
from ballast.host.qmp import Qmp
from ballast.host.quantity import format_size
from ballast.wire.errors import AgentError, BadRequest, DeadlineExceeded
from ballast.wire.memory_names import OnlineResult

OURS = "ballast-"
# From the device to its blocks in the guest: ACPI, and under load minutes of it.
APPEAR_TIMEOUT_S = 60.0
UNPLUG_TIMEOUT_S = 60.0
_LOOK_EVERY_S = 0.2
# The last is what older QEMUs say of DIMMs.
_UNPLUG_EVENTS = ("DEVICE_DELETED", "DEVICE_UNPLUG_GUEST_ERROR", "MEM_UNPLUG_ERROR")


class DimmFailed(AgentError):
    """The guest cannot take a DIMM into use, or cannot let it go; the text names the block."""


@dataclass(frozen=True, slots=True)
class Dimm:
    """A DIMM as QEMU knows it; ``memdev`` is the id of its memory."""

    id: str
    address: int
    bytes: int
    memdev: str


@dataclass(frozen=True, slots=True)
class Removal:
    """What became of one DIMM that was to come off. If it did not, it is online again, or the reason says so."""

    id: str
    address: int
    bytes: int
    result: Literal["removed", "failed"]
    reason: str | None = None


async def read_dimms(qmp: Qmp) -> list[Dimm]:
    """Those that have an id, which taking them out needs. NVDIMMs, which keep what is on them, are none."""
    devices = [one["data"] for one in await qmp.run("query-memory-devices") if one["type"] == "dimm"]
    return [
        Dimm(one["id"], one["addr"], one["size"], one["memdev"].rpartition("/")[2]) for one in devices if "id" in one
    ]


def choose_dimms(dimms: Sequence[Dimm], bytes_: int) -> list[Dimm]:
    """DIMMs of ``bytes_`` in all, preferably ours, and from the top. NotReclaimable tells what there is."""
    sums: dict[int, list[Dimm]] = {0: []}
    for dimm in sorted(dimms, key=lambda one: (not one.id.startswith(OURS), -one.address)):
        for total, chosen in list(sums.items()):
            if total + dimm.bytes <= bytes_:
                sums.setdefault(total + dimm.bytes, [*chosen, dimm])
    if bytes_ not in sums:
        there = ", ".join(f"{one.id} {format_size(one.bytes)}" for one in dimms) or "none"
        raise NotReclaimable(f"only whole DIMMs come off, and no choice of them is {format_size(bytes_)}: {there}")
    return sums[bytes_]


async def add_dimm(agent: Agent, qmp: Qmp, bytes_: int) -> tuple[Dimm, OnlineResult]:
    """Plug in memory and have the guest use it; on failure all is as before. AgentError."""
    block_bytes = await _block_bytes(agent)
    if bytes_ <= 0 or bytes_ % block_bytes:
        raise BadRequest(f"the size must be a multiple of the guest's memory blocks of {format_size(block_bytes)}")
    dimm = await _plug(qmp, bytes_)
    try:
        online = await _bring_online(agent, dimm, block_bytes)
        failed = [one for one in online.blocks if one.result == "failed"]
        if failed:
            raise DimmFailed(f"block {failed[0].phys_index} cannot be brought online: {failed[0].reason}")
    except AgentError as error:
        removal = await remove_dimm(agent, qmp, dimm)
        if removal.result == "failed":
            raise DimmFailed(f"{error.desc}; and {dimm.id} does not come off again: {removal.reason}") from error
        raise
    return dimm, online


async def _plug(qmp: Qmp, bytes_: int) -> Dimm:
    taken = [
        one["name"] for path in ("/objects", "/machine/peripheral") for one in await qmp.run("qom-list", path=path)
    ]
    name = next(f"{OURS}{number}" for number in range(len(taken) + 1) if f"{OURS}{number}" not in taken)
    # Shared, as all of the guest's memory must be for a vhost-user device.
    await qmp.run("object-add", qom_type="memory-backend-memfd", id=name, size=bytes_, share=True)
    try:
        await qmp.run("device_add", driver="pc-dimm", id=name, memdev=name)
    except QmpFailed:
        await qmp.run("object-del", id=name)
        raise
    return next(one for one in await read_dimms(qmp) if one.id == name)


async def _bring_online(agent: Agent, dimm: Dimm, block_bytes: int) -> OnlineResult:
    """Online what the agent has not onlined by itself, once all blocks are there; each block's zone is in the answer.

    By looking, not by an event: an agent that is configured to leave new memory alone tells of none.
    """
    wanted = _blocks(dimm, block_bytes)
    try:
        async with asyncio.timeout(APPEAR_TIMEOUT_S):
            while True:
                if {one.phys_index for one in await agent.guest_get_memory_blocks()}.issuperset(wanted):
                    break
                await asyncio.sleep(_LOOK_EVERY_S)
    except TimeoutError as error:
        raise DeadlineExceeded(f"the guest does not see {dimm.id} within {APPEAR_TIMEOUT_S:g} s") from error
    return await agent.memory_online(blocks=wanted)


async def remove_dimm(agent: Agent, qmp: Qmp, dimm: Dimm, timeout_ms: int | None = None) -> Removal:
    """Have the guest empty a DIMM, and take it out; if that fails, the guest has it again. Never raises AgentError."""
    left_over = None
    try:
        await _empty(agent, dimm, timeout_ms)
        await _unplug(qmp, dimm)
    except AgentError as error:
        reason = error.desc + await _bring_back(agent, dimm)
        return Removal(dimm.id, dimm.address, dimm.bytes, "failed", reason)
    try:
        await qmp.run("object-del", id=dimm.memdev)
    except AgentError as error:
        left_over = f"its memory {dimm.memdev} stays with QEMU: {error.desc}"
    return Removal(dimm.id, dimm.address, dimm.bytes, "removed", left_over)


async def _empty(agent: Agent, dimm: Dimm, timeout_ms: int | None) -> None:
    """Take all blocks offline; the guest itself brings back what it had emptied before the one that stays in use."""
    blocks = set(_blocks(dimm, await _block_bytes(agent)))
    if blocks.isdisjoint(one.phys_index for one in await agent.guest_get_memory_blocks()):
        return  # it never came to the guest
    result = await agent.memory_offline(dimm=dimm.address, timeout_ms=timeout_ms)
    failed = [one for one in result.blocks if one.result == "failed"]
    culprits = [one for one in failed if one.reason not in ("undone", "not-tried", "stays-offline")] or failed
    if culprits:
        raise DimmFailed(f"block {culprits[0].phys_index} stays in use: {culprits[0].reason}")
    if not result.dimms or not all(one.offline for one in result.dimms):
        raise DimmFailed("the guest does not say that all of it is offline")


async def _unplug(qmp: Qmp, dimm: Dimm) -> None:
    with qmp.listening(_UNPLUG_EVENTS) as events:
        await qmp.run("device_del", id=dimm.id)
        try:
            async with asyncio.timeout(UNPLUG_TIMEOUT_S):
                while not _is_about(event := await events.get(), dimm):
                    pass
        except TimeoutError as error:
            raise DeadlineExceeded(f"the guest does not let {dimm.id} go within {UNPLUG_TIMEOUT_S:g} s") from error
    if event["event"] != "DEVICE_DELETED":
        raise DimmFailed(f"the guest's kernel refused to let {dimm.id} go")


def _is_about(event: Mapping[str, Any], dimm: Dimm) -> bool:
    return bool(event["data"].get("device") == dimm.id)


async def _bring_back(agent: Agent, dimm: Dimm) -> str:
    """Let the guest use a DIMM again that does not come off; words about what it cannot."""
    try:
        back = await agent.memory_online(blocks=_blocks(dimm, await _block_bytes(agent)))
    except AgentError as error:
        return f"; it may be offline in part: {error.desc}"
    left = [str(one.phys_index) for one in back.blocks if one.result == "failed"]
    return f"; blocks {', '.join(left)} stay offline" if left else ""


async def _block_bytes(agent: Agent) -> int:
    """Size of the guest's memory blocks. DimmFailed where its kernel has none."""
    if not (block_bytes := (await agent.memory_status()).blocks.size_bytes):
        raise DimmFailed("the guest's kernel has no memory hot-plug")
    return block_bytes


def _blocks(dimm: Dimm, block_bytes: int) -> list[int]:
    """Indexes of the guest's memory blocks that a DIMM is (Documentation/admin-guide/mm/memory-hotplug.rst)."""
    return list(range(dimm.address // block_bytes, (dimm.address + dimm.bytes) // block_bytes))
