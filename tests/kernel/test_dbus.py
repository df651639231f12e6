"""Freeze and Thaw over a bus of our own, on a real file system with a real guard."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from ballast.guest.bus import Bus
from ballast.guest.commands.quiesce import QuiesceCommands
from ballast.guest.dispatch import Table
from ballast.guest.events import Events
from ballast.guest.quiesce.services import Services
from ballast.guest.quiesce.session import Quiesce
from ballast.guest.service.dbus import INTERFACE, NAME, PATH, Dbus
from tests.kernel.conftest import LoopFs, MakeLoopFs
from tests.kernel.test_linux import DEADLINE_S
from tests.kernel.test_quiesce import is_frozen
from tests.unit.guest.private_bus import PrivateBus

MakeQuiesce = Callable[..., Quiesce]


@asynccontextmanager
async def show(bus: PrivateBus, quiesce: Quiesce, events: Events, block: list[str]) -> AsyncIterator[None]:
    """What ``daemon.py`` puts together."""
    table = Table(is_frozen=lambda: quiesce.is_frozen, block=block)
    table.add(QuiesceCommands(quiesce))
    ours = Bus(NAME, is_frozen=lambda: quiesce.is_frozen, path=str(bus.path))
    services = Services(ours, is_frozen=lambda: quiesce.is_frozen, markers=bus.path.parent / "services")
    dbus = Dbus(ours, events, table.answer, services, version="0", balloon_bytes=lambda: 0)
    task = asyncio.create_task(dbus.run())
    try:
        await bus.wait_name()
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        bus.stop()


async def freeze(bus: PrivateBus, filesystem: LoopFs, lease_ms: int = 30_000) -> str:
    return str((await bus.call("Freeze", "tas", str(lease_ms), "1", str(filesystem.path))).data())


async def test_freeze_and_thaw_from_two_connections_are_one_session(
    make_loop_fs: MakeLoopFs, make_quiesce: MakeQuiesce, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "ballast.guest.dispatch")
    filesystem, other, events, bus = make_loop_fs(), make_loop_fs(), Events(), PrivateBus(tmp_path)
    quiesce = make_quiesce(filesystem, other, events=events)
    async with show(bus, quiesce, events, block=[]), bus.listen() as changes, asyncio.timeout(DEADLINE_S):
        session_id = await freeze(bus, filesystem)
        assert str(uuid.UUID(session_id)) == session_id
        assert (is_frozen(filesystem), is_frozen(other)) == (True, False)
        assert await bus.get("FreezeState") == "frozen"
        busy = await bus.send(PATH, f"{INTERFACE}.Freeze", "uint64:5000", "array:string:")
        assert busy.err.startswith(f"Error org.ballast.Error.Busy: a freeze is held by {session_id}")
        assert (await bus.call("Thaw", "s", session_id)).data() is True
        assert not is_frozen(filesystem)
        assert [(await changes.get())["FreezeState"] for _ in range(3)] == ["freezing", "frozen", "thawed"]
        assert (await bus.call("Thaw", "s", session_id)).data() is True  # a repeat
        unknown = await bus.send(PATH, f"{INTERFACE}.Thaw", "string:x")
        assert unknown.err == "Error org.ballast.Error.NoSuchId: no freeze has the id x"
    audited = [message for message in caplog.messages if message.startswith("dbus:1.")]
    assert [line.split(" ran ")[1].split(",")[0] for line in audited] == [
        "ballast-quiesce-begin: done",
        f"ballast-quiesce-begin: a freeze is held by {session_id}",
        "ballast-quiesce-end: done",
        "ballast-quiesce-end: done",
        "ballast-quiesce-end: no freeze has the id x",
    ]


@pytest.mark.parametrize(
    ("lease_ms", "mountpoint", "error"),
    [(999, "", "BadArgument: Parameter 'lease-ms'"), (1 << 63, "", "BadArgument"), (5000, "/no/such", "BadArgument")],
)
async def test_what_the_wire_refuses_is_refused(
    make_loop_fs: MakeLoopFs, make_quiesce: MakeQuiesce, tmp_path: Path, lease_ms: int, mountpoint: str, error: str
) -> None:
    filesystem, events, bus = make_loop_fs(), Events(), PrivateBus(tmp_path)
    async with show(bus, make_quiesce(filesystem, events=events), events, block=[]):
        said = await bus.send(PATH, f"{INTERFACE}.Freeze", f"uint64:{lease_ms}", f"array:string:{mountpoint}")
        assert said.err.startswith(f"Error org.ballast.Error.{error}")
        assert not is_frozen(filesystem)
        assert await bus.get("FreezeState") == "thawed"


async def test_what_the_configuration_blocks_is_blocked_here_too(
    make_loop_fs: MakeLoopFs, make_quiesce: MakeQuiesce, tmp_path: Path
) -> None:
    filesystem, events, bus = make_loop_fs(), Events(), PrivateBus(tmp_path)
    quiesce = make_quiesce(filesystem, events=events)
    async with show(bus, quiesce, events, block=["ballast-quiesce-begin"]):
        said = await bus.send(PATH, f"{INTERFACE}.Freeze", "uint64:5000", "array:string:")
        assert said.err.startswith("Error org.ballast.Error.RefusedByPolicy: Command ballast-quiesce-begin")
        assert not is_frozen(filesystem)


async def test_a_bus_that_dies_while_frozen_changes_nothing_and_is_found_after_the_thaw(
    make_loop_fs: MakeLoopFs, make_quiesce: MakeQuiesce, tmp_path: Path
) -> None:
    filesystem, events, bus = make_loop_fs(), Events(), PrivateBus(tmp_path)
    quiesce = make_quiesce(filesystem, events=events)
    async with show(bus, quiesce, events, block=[]), asyncio.timeout(DEADLINE_S):
        session_id = await freeze(bus, filesystem)
        bus.stop()
        bus.start()
        ended = await quiesce.end(session_id)
        assert ended.held
        await bus.wait_name()
        assert (await bus.call("Thaw", "s", session_id)).data() is True


async def test_a_lease_that_ends_is_signalled(
    make_loop_fs: MakeLoopFs, make_quiesce: MakeQuiesce, tmp_path: Path
) -> None:
    filesystem, events, bus = make_loop_fs(), Events(), PrivateBus(tmp_path)
    quiesce = make_quiesce(filesystem, events=events)
    async with show(bus, quiesce, events, block=[]), bus.listen() as changes, asyncio.timeout(DEADLINE_S):
        session_id = await freeze(bus, filesystem, 1_000)
        while (await changes.get())["FreezeState"] != "thawed":
            pass
        assert not is_frozen(filesystem)
        assert (await bus.call("Thaw", "s", session_id)).data() is False
