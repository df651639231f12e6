"""What each command of ballastctl does: talk to an agent, show what came of it, return the exit status."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import sys
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from enum import IntEnum
from typing import Any

from ballast.host import view
from ballast.host.agent import Agent
from ballast.host.connect import PeerGone
from ballast.host.machine import NotReclaimable
from ballast.host.show import Table, progress, put_json, put_line, put_tables, say
from ballast.host.window import FreezePlan, FrozenWindow
from ballast.wire.errors import (
    AgentError,
    BadRequest,
    Busy,
    Frozen,
    LeaseExpired,
    Refused,
    StaleEpoch,
    Unauthenticated,
)
from ballast.wire.memory_names import BlockResult, DemandInterval
from ballast.wire.names import QuiesceBegun

Connect = Callable[[], AbstractAsyncContextManager[Agent]]
Verb = Callable[[argparse.Namespace, Connect], Awaitable[int]]

# How long a command that is told to end may take, before it is killed, and then.
TERMINATE_S = 5.0
KILL_S = 1.0


class Exit(IntEnum):
    """Exit statuses of ballastctl."""

    DONE = 0
    FAILED = 1
    USAGE = 2
    UNREACHABLE = 3
    REFUSED = 4
    PARTIAL = 5
    NOT_HELD = 6

    @classmethod
    def of(cls, error: AgentError) -> Exit:
        """Tell what a caller can do about ``error``."""
        kinds: list[tuple[Exit, tuple[type[AgentError], ...]]] = [
            (cls.UNREACHABLE, (PeerGone,)),
            (cls.REFUSED, (Unauthenticated, Refused, Frozen, Busy, StaleEpoch, NotReclaimable)),
            (cls.NOT_HELD, (LeaseExpired,)),
            (cls.USAGE, (BadRequest,)),
        ]
        return next((code for code, classes in kinds if isinstance(error, classes)), cls.FAILED)


async def show_status(args: argparse.Namespace, connect: Connect) -> int:
    """Show agent, memory and quiesce in one view; without a token a vsock peer sees the first only."""
    parts: dict[str, Any] = {}
    errors: dict[str, str] = {}
    async with connect() as agent:
        about = await agent.status()
        for name, ask in (("memory", agent.memory_status), ("quiesce", agent.quiesce_status)):
            try:
                parts[name] = await ask()
            except PeerGone:
                raise
            except AgentError as error:
                errors[name] = error.desc
    if args.json:
        put_json({"agent": about, "memory": None, "quiesce": None, "errors": errors} | parts)
    else:
        tables = [view.agent_table(args.target, about)]
        tables += [view.memory_table(parts["memory"])] if "memory" in parts else []
        tables += view.quiesce_tables(parts["quiesce"]) if "quiesce" in parts else []
        tables += [Table(name, [("not shown", why)]) for name, why in errors.items()]
        put_tables(tables)
    return Exit.PARTIAL if errors else Exit.DONE


async def watch(args: argparse.Namespace, connect: Connect) -> int:
    """Print events until interrupted."""
    async with connect() as agent:
        demand = DemandInterval(args.demand) if args.demand is not None else None
        await agent.subscribe(psi=args.psi, demand=demand)
        say("watching, Ctrl-C ends it")
        last_seq: int | None = None
        async for event in agent.events():
            if last_seq is not None and event.seq > last_seq + 1:
                say(f"{event.seq - last_seq - 1} events were lost; ask for the status")
            last_seq = event.seq
            if args.json:
                put_line(event.encode().decode().rstrip("\n"))
            else:
                put_line(view.event_line(event))
    return Exit.DONE


async def forecast(args: argparse.Namespace, connect: Connect) -> int:
    """Show what a freeze would cover and what may go wrong in it; risks are no failure, not to have looked is."""
    async with connect() as agent:
        with progress("looking"):
            told = await agent.quiesce_forecast(round(1000 * args.lease), args.mountpoint, args.exclude)
    put_json(told) if args.json else put_tables(view.forecast_tables(told))
    return Exit.PARTIAL if any(risk.detail.startswith("cannot tell") for risk in told.risks) else Exit.DONE


async def freeze(args: argparse.Namespace, connect: Connect) -> int:
    """Freeze; with a command, run it in the frozen window, thaw, and tell whether it held."""
    plan = FreezePlan(args.lease, args.max_hold, args.mountpoint, args.exclude, args.level, args.on_failure)
    async with FrozenWindow(connect, plan, say) as window:
        with progress("freezing"):
            begun = await window.begin()
        if not args.command:
            await window.leave_held()
            put_json(begun) if args.json else put_tables(view.begun_tables(begun))
            return Exit.PARTIAL if _is_partial(begun) else Exit.DONE
        try:
            status = await _run_command(args, begun)
        except asyncio.CancelledError:
            say("thawing before leaving")
            raise
        ended = None
        try:
            with progress("thawing"):
                ended = await window.end()
        except AgentError as error:
            say(f"cannot tell whether it held: {error.desc}")
    held = ended is not None and ended.held
    if args.json:
        command = {"argv": list(args.command), "status": status}
        put_json({"held": held, "command": command, "begun": begun, "ended": ended})
    else:
        put_tables(view.window_tables(begun, ended, status))
    if status != 0:
        return Exit.FAILED
    if not held:
        return Exit.NOT_HELD
    return Exit.PARTIAL if _is_partial(begun) else Exit.DONE


def _is_partial(begun: QuiesceBegun) -> bool:
    states = {f.state for f in begun.filesystems} | {w.state for w in begun.writers}
    return begun.consistency == "none" or bool(states & {"failed", "freezing", "timed-out"})


async def _run_command(args: argparse.Namespace, begun: QuiesceBegun) -> int:
    """Run the command to its end; its status, that of a shell where it could not be run or died by a signal."""
    about = {"BALLAST_ID": begun.id, "BALLAST_TARGET": args.target, "BALLAST_CONSISTENCY": begun.consistency}
    # With --json our output is one document for a program: the command's goes to where people look.
    stdout = sys.stderr if args.json else None
    try:
        process = await asyncio.create_subprocess_exec(*args.command, env=os.environ | about, stdout=stdout)
    except OSError as error:
        say(f"{args.command[0]}: {error.strerror or error}")
        return 127
    try:
        status = await process.wait()
    finally:
        if process.returncode is None:
            await _stop(process)
    if status < 0:
        say(f"{args.command[0]} died by signal {-status}")
    return 128 - status if status < 0 else status


async def _stop(process: asyncio.subprocess.Process) -> None:
    for stop, patience_s in ((process.terminate, TERMINATE_S), (process.kill, KILL_S)):
        with contextlib.suppress(ProcessLookupError):
            stop()
        try:
            async with asyncio.timeout(patience_s):
                await process.wait()
            return
        except TimeoutError:
            say("the command does not end")


async def thaw(args: argparse.Namespace, connect: Connect) -> int:
    """End a freeze and tell whether it held."""
    async with connect() as agent:
        name = args.id
        if name is None:
            status = await agent.quiesce_status()
            if status.id is None:
                say("nothing is frozen; what was frozen before did not hold")
                return Exit.NOT_HELD
            name = status.id
        with progress("thawing"):
            ended = await agent.quiesce_end(name)
    put_json(ended) if args.json else put_tables(view.ended_tables(ended))
    return Exit.DONE if ended.held else Exit.NOT_HELD


async def online(args: argparse.Namespace, connect: Connect) -> int:
    """Bring memory blocks online."""
    async with connect() as agent:
        with progress("bringing memory online"):
            result = await agent.memory_online(args.size, args.block, args.zone)
    put_json(result) if args.json else put_tables(view.online_tables(result))
    is_short = args.size is not None and result.bytes < args.size
    return _online_outcome(result.blocks, is_short=is_short)


def _online_outcome(blocks: Sequence[BlockResult], *, is_short: bool) -> Exit:
    failed = [block for block in blocks if block.result == "failed"]
    if not failed and not is_short:
        return Exit.DONE
    return Exit.PARTIAL if len(failed) < len(blocks) else Exit.FAILED
