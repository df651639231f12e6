"""What the commands of ballastctl do that change how much memory a guest has. Each step is finished before we leave."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager, nullcontext

from ballast.host import memory_view
from ballast.host.agent import Agent
from ballast.host.balloon import Inflation, Outcome
from ballast.host.config import Vm
from ballast.host.dimms import Removal, add_dimm, choose_dimms, read_dimms, remove_dimm
from ballast.host.machine import NotReclaimable
from ballast.host.qemu import Qemu
from ballast.host.qmp import Qmp
from ballast.host.reclaim import GRAIN_BYTES, Reclaim
from ballast.host.show import progress, progress_bar, put_json, put_tables, say
from ballast.host.verbs import Connect, Exit


def qmp_of(vm: Vm, given: str | None) -> str:
    """The socket by which a VM may be changed: the one given, or its own. NotReclaimable tells why there is none."""
    if vm.libvirt is not None:
        raise NotReclaimable(
            f"{vm.libvirt} is libvirt's: memory that is changed behind its back is missing from its XML, "
            "and lost at the next start"
        )
    if (qmp := given or vm.qmp) is None:
        raise NotReclaimable('QEMU is not known here: give --qmp PATH, or qmp = "unix:PATH" in host.toml')
    return qmp


async def finish(step: Awaitable[None]) -> None:
    """Let a step come to its end even if we are told to leave meanwhile; then leave."""
    running = asyncio.ensure_future(step)
    try:
        await asyncio.shield(running)
    except asyncio.CancelledError:
        if not running.done():
            say("finishing what is in hand")
            await asyncio.wait({running})
        if not running.cancelled() and (error := running.exception()) is not None:
            say(str(error))
        raise


async def balloon_set(args: argparse.Namespace, connect: Connect) -> int:
    """Inflate or deflate to a size; without QMP only if the host is to get nothing."""
    async with connect() as agent:
        before_bytes = (await agent.memory_status()).balloon.bytes
        outcome = Outcome(args.size, before_bytes)
        if before_bytes > args.size:
            with progress("deflating"):
                given = await agent.balloon_deflate(args.size)
            outcome.given_back_bytes, outcome.total_bytes = given.bytes, given.total_bytes
            outcome.stopped = "done" if given.total_bytes + GRAIN_BYTES > args.size else "gave-way"
        else:
            await _inflate(args, agent, outcome)
            outcome.total_bytes = (await agent.memory_status()).balloon.bytes
    _put_outcome(args, outcome)
    return Exit.DONE if outcome.stopped == "done" and not outcome.not_zero_bytes else Exit.PARTIAL


async def _inflate(args: argparse.Namespace, agent: Agent, outcome: Outcome) -> None:
    machine = nullcontext() if args.no_reclaim else Qemu.connect(args.qmp, args.safe_vhost_user)
    async with machine as opened:
        reclaim = Reclaim(agent, opened)
        await reclaim.begin()
        try:
            with progress_bar("inflating", outcome.target_bytes - outcome.total_bytes) as advance:
                await Inflation(reclaim, outcome, finish=finish, advance=advance).run()
        except BaseException:
            _put_outcome(args, outcome)
            raise


def _put_outcome(args: argparse.Namespace, outcome: Outcome) -> None:
    put_json(outcome) if args.json else put_tables([memory_view.balloon_table(outcome)])


async def balloon_show(args: argparse.Namespace, connect: Connect) -> int:
    """What the balloon holds, every frame of it looked up in the guest now."""
    async with connect() as agent:
        with progress("looking"):
            ranges = await agent.balloon_ranges()
        state = (await agent.memory_status()).balloon
    if args.json:
        put_json({"target-bytes": state.target_bytes, "balloon": ranges})
    else:
        put_tables([memory_view.ranges_table(ranges, state.target_bytes)])
    return Exit.DONE


async def explain(args: argparse.Namespace, connect: Connect) -> int:
    """What changed memory lately, from which numbers and why."""
    async with connect() as agent:
        decisions = await agent.memory_explain()
    put_json(decisions) if args.json else put_tables([memory_view.decisions_table(decisions)])
    return Exit.DONE


async def memory_add(args: argparse.Namespace, connect: Connect) -> int:
    """Plug in a DIMM and have it online, or leave all as it was."""
    async with _agent_and_qmp(args, connect) as (agent, qmp):

        async def add() -> None:
            with progress("adding memory"):
                dimm, online = await add_dimm(agent, qmp, args.size)
            if args.json:
                put_json({"id": dimm.id, "address": dimm.address, "bytes": dimm.bytes, "blocks": online.blocks})
            else:
                put_tables(memory_view.added_tables(dimm, online))

        await finish(add())
    return Exit.DONE


async def memory_remove(args: argparse.Namespace, connect: Connect) -> int:
    """Take DIMMs out, each whole or not at all."""
    removals: list[Removal] = []
    async with _agent_and_qmp(args, connect) as (agent, qmp):
        chosen = choose_dimms(await read_dimms(qmp), args.size)

        async def remove_next() -> None:
            removals.append(await remove_dimm(agent, qmp, chosen[len(removals)], round(1000 * args.offline_timeout)))

        try:
            with progress(lambda: f"removing {chosen[len(removals)].id}"):
                while len(removals) < len(chosen):
                    await finish(remove_next())
        finally:
            removed_bytes = sum(one.bytes for one in removals if one.result == "removed")
            if args.json:
                put_json({"bytes": removed_bytes, "dimms": removals})
            else:
                put_tables([memory_view.removals_table(removed_bytes, removals)])
    if removed_bytes == args.size:
        return Exit.DONE
    return Exit.PARTIAL if removed_bytes else Exit.FAILED


async def offline(args: argparse.Namespace, connect: Connect) -> int:
    """Have the guest take memory offline, and say which DIMMs can be unplugged."""
    async with connect() as agent:
        with progress("taking memory offline"):
            result = await agent.memory_offline(args.size, args.block, args.dimm, round(1000 * args.offline_timeout))
    put_json(result) if args.json else put_tables(memory_view.offline_tables(result))
    failed = [one for one in result.blocks if one.result == "failed"]
    is_short = args.size is not None and sum(one.bytes for one in result.dimms if one.offline) < args.size
    if not failed and not is_short:
        return Exit.DONE
    return Exit.PARTIAL if len(failed) < len(result.blocks) else Exit.FAILED


@asynccontextmanager
async def _agent_and_qmp(args: argparse.Namespace, connect: Connect) -> AsyncIterator[tuple[Agent, Qmp]]:
    async with connect() as agent, Qmp.connect(args.qmp) as qmp:
        yield agent, qmp
