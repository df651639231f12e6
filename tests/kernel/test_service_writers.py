"""A service on the bus that takes part in the freeze of a real file system, under a real guard."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from ballast.guest.bus import Bus, Variant
from ballast.guest.events import Events
from ballast.guest.quiesce.record import Open, Record, write_record
from ballast.guest.quiesce.services import Services
from ballast.guest.quiesce.session import Quiesce
from ballast.guest.quiesce.writer import Writer
from ballast.guest.service.dbus import NAME, Dbus
from ballast.wire.errors import AgentError
from ballast.wire.message import Failure
from ballast.wire.names import WriterResult
from tests.kernel.conftest import LoopFs, MakeLoopFs
from tests.kernel.test_linux import DEADLINE_S
from tests.kernel.test_quiesce import is_frozen
from tests.unit.guest.bus_peer import Peer
from tests.unit.guest.private_bus import PrivateBus

LEASE_MS = 30_000
ANSWERS: dict[str, tuple[str, list[Any]]] = {
    "Freeze": ("a{sv}", [{"position": Variant("t", 7)}]),
    "Thaw": ("bs", [True, ""]),
}


class Stage:
    """A file system, an agent with its bus, and the service ``peer``, which has registered as "shop"."""

    def __init__(self, filesystem: LoopFs, quiesce: Quiesce, services: Services, bus: PrivateBus, peer: Peer) -> None:
        self.filesystem = filesystem
        self.quiesce = quiesce
        self.services = services
        self.bus = bus
        self.peer = peer
        self.heard: list[tuple[str, bool]] = []
        peer.answers = dict(ANSWERS)
        peer.hear = lambda member: self.heard.append((member, is_frozen(filesystem)))

    async def register(self, **description: Any) -> None:
        await self.services.register("shop", self.peer.name, "/shop", description)

    def results(self, writers: list[WriterResult]) -> dict[str, str]:
        return {writer.name: writer.state for writer in writers}


@pytest.fixture
async def stage(make_loop_fs: MakeLoopFs, make_quiesce: Callable[..., Quiesce], tmp_path: Path) -> AsyncIterator[Stage]:
    filesystem, bus, events = make_loop_fs(), PrivateBus(tmp_path), Events()

    def find() -> list[Writer]:
        return services.writers()

    async def nothing(*_: Any) -> Failure:
        return Failure(AgentError("not asked"))

    quiesce = make_quiesce(filesystem, events=events, find_writers=find)
    ours = Bus(NAME, is_frozen=lambda: quiesce.is_frozen, path=str(bus.path))
    services = Services(ours, is_frozen=lambda: quiesce.is_frozen, markers=tmp_path / "services")
    dbus = Dbus(ours, events, nothing, services, version="0", balloon_bytes=lambda: 0)
    tasks = [asyncio.create_task(one) for one in (dbus.run(), services.run(quiesce.wait_recovered))]
    try:
        async with asyncio.timeout(2 * DEADLINE_S), Peer(bus.path) as peer:
            await ours.wait_connected()
            yield Stage(filesystem, quiesce, services, bus, peer)
    finally:
        for task in tasks:
            assert not task.done()
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        bus.stop()


@asynccontextmanager
async def frozen(stage: Stage) -> AsyncIterator[None]:
    begun = await stage.quiesce.begin("x", LEASE_MS)
    assert begun.consistency == "application"
    assert [(writer.state, writer.detail) for writer in begun.writers] == [("frozen", {"position": "7"})]
    assert is_frozen(stage.filesystem)
    yield
    assert not is_frozen(stage.filesystem)


async def test_it_is_asked_before_and_after_and_not_while_frozen(stage: Stage) -> None:
    await stage.register(level="system", critical=True)
    async with frozen(stage):
        assert [member for member, _ in stage.heard] == ["Prepare", "Freeze"]
        ended = await stage.quiesce.end("x")
    assert ended.held
    assert stage.results(ended.writers) == {"shop": "thawed"}
    assert await stage.peer.take(4) == ["Prepare", "Freeze", "Thaw", "Post"]
    assert not any(was_frozen for _, was_frozen in stage.heard)


async def test_nobody_on_the_bus_is_called_while_frozen(stage: Stage) -> None:
    await stage.register()
    async with Peer(stage.bus.path) as idle, Peer(stage.bus.path) as monitor:
        await stage.services.register("idle", idle.name, "/idle", {"level": "front-end"})
        idle.answers = dict(ANSWERS)
        await monitor.monitor()
        begun = await stage.quiesce.begin("x", LEASE_MS)
        assert stage.results(begun.writers) == {"shop": "frozen", "idle": "frozen"}
        assert sorted(await monitor.take(4)) == ["Freeze", "Freeze", "Prepare", "Prepare"]
        idle.leave()
        while len(stage.services.writers()) > 1:  # noqa: ASYNC110 - nobody tells of it
            await asyncio.sleep(0)
        assert stage.results((await stage.quiesce.end("x")).writers) == {"shop": "thawed", "idle": "lost"}
        assert await monitor.take(2) == ["Thaw", "Post"]


async def test_what_leaves_the_bus_while_frozen_did_not_hold(stage: Stage) -> None:
    await stage.register()
    async with frozen(stage):
        stage.peer.leave()
        while stage.services.writers():  # noqa: ASYNC110 - nobody tells of it
            await asyncio.sleep(0)
        ended = await stage.quiesce.end("x")
    assert (ended.held, ended.reason) == (False, "writer-lost")
    assert stage.results(ended.writers) == {"shop": "lost"}


async def test_a_bus_that_dies_while_frozen_takes_its_services_along(stage: Stage) -> None:
    await stage.register()
    async with frozen(stage):
        stage.bus.stop()
        stage.bus.start()
        while stage.services.writers():  # noqa: ASYNC110
            await asyncio.sleep(0)
        ended = await stage.quiesce.end("x")
    assert (ended.held, ended.reason) == (False, "writer-lost")
    await stage.bus.wait_name()
    assert await stage.peer.take(2) == ["Prepare", "Freeze"]
    assert stage.peer.asked.empty()


async def test_a_service_that_hangs_is_aborted_once_and_stops_the_freeze_if_it_is_critical(stage: Stage) -> None:
    await stage.register(**{"critical": True, "freeze-ms": 100})

    def hang(member: str) -> None:
        stage.peer.is_silent = member == "Freeze"

    stage.peer.hear = hang
    with pytest.raises(AgentError, match="shop"):
        await stage.quiesce.begin("x", LEASE_MS)
    assert not is_frozen(stage.filesystem)
    assert await stage.peer.take(3) == ["Prepare", "Freeze", "Abort"]
    await stage.register(**{"freeze-ms": 100})
    begun = await stage.quiesce.begin("y", LEASE_MS)
    assert (begun.consistency, stage.results(begun.writers)) == ("filesystem", {"shop": "timed-out"})
    assert (await stage.quiesce.end("y")).held
    assert await stage.peer.take(3) == ["Prepare", "Freeze", "Abort"]
    assert stage.peer.asked.empty()


async def test_what_was_prepared_when_the_agent_died_is_named_as_lost(
    make_loop_fs: MakeLoopFs, make_quiesce: Callable[..., Quiesce], tmp_path: Path
) -> None:
    write_record(tmp_path / "quiesce.json", Record(Open("x", 2**22 + 1, "1", [])))
    (tmp_path / "services").mkdir()
    (tmp_path / "services/shop").touch()
    async with asyncio.timeout(DEADLINE_S):
        ended = await make_quiesce(make_loop_fs()).end("x")
    assert [(ended.held, one.name, one.state, one.reason) for one in ended.writers] == [
        (False, "shop", "lost", "the agent was restarted")
    ]
