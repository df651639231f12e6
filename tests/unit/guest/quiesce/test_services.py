"""Services on a real bus that take part in a freeze: asked in time, told that it is over once, whoever dies."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from ballast.guest.bus import Bus, BusError, Call, Variant
from ballast.guest.quiesce.services import Services
from ballast.guest.quiesce.writer import Writer, WriterEnded, WriterFailed, WriterTimedOut
from ballast.guest.service.dbus import NAME
from ballast.wire.errors import BadRequest, Busy, Frozen, NoSuchId
from tests.unit.guest.bus_peer import Peer
from tests.unit.guest.private_bus import DEADLINE_S, PrivateBus

PATH = "/org/example/Shop"
LEASE_MS = 30_000
SHORT_S = 0.05
PREPARE = {"mountpoints": ["/srv/\udcff"], "lease-ms": LEASE_MS}
ANSWERS: dict[str, tuple[str, list[Any]]] = {"Freeze": ("a{sv}", [{}]), "Thaw": ("bs", [True, ""])}


class Agent:
    """What one agent has of it. ``markers`` outlives it."""

    def __init__(self, real: PrivateBus, markers: Path) -> None:
        self.is_frozen = False
        self.thawed = asyncio.Event()
        self.bus = Bus(NAME, is_frozen=lambda: self.is_frozen, path=str(real.path))
        self.services = Services(self.bus, is_frozen=lambda: self.is_frozen, markers=markers)
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Agent:
        self._tasks = [asyncio.create_task(self.services.run(self._wait_thawed))]
        await self.join_bus()
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            assert not task.done()
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _wait_thawed(self) -> None:
        await self.thawed.wait()

    async def join_bus(self) -> None:
        def refuse(call: Call) -> None:
            call.refuse("a.B", "nobody is called here")

        self._tasks.append(asyncio.create_task(self.bus.run(refuse, pause_min_s=0.001)))
        await self.bus.wait_connected()

    async def leave_bus(self) -> None:
        """Lose the connection, and nothing but that."""
        task = self._tasks.pop()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    async def prepare(self, peer: Peer) -> Writer:
        """Register the peer and have it prepare."""
        await self.services.register("shop", peer.name, PATH, {})
        (writer,) = self.services.writers()
        await writer.start("x", {}, timeout_s=DEADLINE_S)
        assert await writer.ask("prepare", timeout_s=DEADLINE_S, **PREPARE) == {}
        assert await peer.take(1) == ["Prepare"]
        return writer


@pytest.fixture
def real(tmp_path: Path) -> Iterator[PrivateBus]:
    bus = PrivateBus(tmp_path)
    yield bus
    bus.stop()


@pytest.fixture
def markers(tmp_path: Path) -> Path:
    return tmp_path / "markers"


@pytest.fixture
async def agent(real: PrivateBus, markers: Path) -> AsyncIterator[Agent]:
    async with asyncio.timeout(2 * DEADLINE_S), Agent(real, markers) as agent:
        agent.thawed.set()
        yield agent


@pytest.fixture
async def peer(real: PrivateBus) -> AsyncIterator[Peer]:
    async with Peer(real.path) as peer:
        peer.answers = dict(ANSWERS)
        yield peer


async def test_a_service_is_asked_with_what_a_program_would_be(agent: Agent, peer: Peer, markers: Path) -> None:
    await agent.services.register("shop", peer.name, PATH, {"level": "front-end", "freeze-ms": 500})
    (writer,) = agent.services.writers()
    description = await writer.start("x\0", {"freeze-ms": 600, "colour": 1}, timeout_s=DEADLINE_S)
    assert (description.level, description.freeze_ms, description.absent) == ("front-end", 600, None)
    detail = {"lsn": Variant("s", "0/1"), "raw": Variant("ay", b"\1"), "load": Variant("d", math.inf)}
    peer.answers["Freeze"] = ("a{sv}", [detail | {"of": Variant("a{uv}", {1: Variant("as", ["a"])})}])
    assert await writer.ask("prepare", timeout_s=5, **PREPARE) == {}
    assert [json.loads(one.read_text())["session_id"] for one in markers.iterdir()] == ["x\0"]
    assert await writer.ask("freeze", timeout_s=6) == {
        "detail": {"lsn": "0/1", "raw": [1], "load": "inf", "of": {"1": ["a"]}}
    }
    assert await writer.ask("thaw", timeout_s=7) == {"held": True}
    assert list(markers.iterdir()) == []
    assert await writer.ask("post", timeout_s=8, held=False) == {}
    writer.close()
    asked = [await peer.asked.get() for _ in range(4)]
    assert {(one.path, one.interface) for one in asked} == {(PATH, "org.ballast.Writer1")}
    facts = {"mountpoints": Variant("as", ["/srv/\\udcff"]), "lease-ms": Variant("t", LEASE_MS)}
    assert [(one.member, one.signature, one.body) for one in asked] == [
        ("Prepare", "sta{sv}", ["x\\0", 5000, facts]),
        ("Freeze", "st", ["x\\0", 6000]),
        ("Thaw", "st", ["x\\0", 7000]),
        ("Post", "stb", ["x\\0", 8000, False]),
    ]


async def test_what_did_not_hold_and_what_failed_is_told(agent: Agent, peer: Peer) -> None:
    writer = await agent.prepare(peer)
    assert await writer.ask("freeze", timeout_s=DEADLINE_S) == {}
    peer.error = "org.ballast.Error.Retryable"
    with pytest.raises(WriterFailed, match=r"^no, not now$") as refused:
        await writer.ask("freeze", timeout_s=DEADLINE_S)
    assert refused.value.retryable
    peer.error = "org.example.Error.Full"
    with pytest.raises(WriterFailed, match=r"^org.example.Error.Full: no, not now$") as refused:
        await writer.ask("freeze", timeout_s=DEADLINE_S)
    assert not refused.value.retryable
    peer.error = ""
    peer.answers["Freeze"] = ("s", ["what?"])
    with pytest.raises(WriterFailed, match="Freeze returns"):
        await writer.ask("freeze", timeout_s=DEADLINE_S)
    peer.answers["Thaw"] = ("bs", [False, "the server restarted"])
    assert await writer.ask("thaw", timeout_s=DEADLINE_S) == {"held": False, "reason": "the server restarted"}


@pytest.mark.parametrize(
    ("name", "description", "error"),
    [
        ("", {}, BadRequest),
        ("Shop", {}, BadRequest),
        ("../shop", {}, BadRequest),
        ("x" * 65, {}, BadRequest),
        ("shop", {"level": "middle"}, BadRequest),
        ("shop", {"level": 1}, BadRequest),
        ("shop", {"critical": "yes"}, BadRequest),
        ("shop", {"thaw-ms": 0}, BadRequest),
        ("taken", {}, Busy),
    ],
)
async def test_a_registration_that_makes_no_sense_is_refused(
    agent: Agent, peer: Peer, real: PrivateBus, name: str, description: dict[str, Any], error: type[Exception]
) -> None:
    async with Peer(real.path) as other:
        await agent.services.register("taken", other.name, PATH, {})
        with pytest.raises(error):
            await agent.services.register(name, peer.name, PATH, description)
        with pytest.raises(NoSuchId):
            agent.services.unregister("taken", peer.name)
        assert [writer.name for writer in agent.services.writers()] == ["taken"]


async def test_so_many_register_and_no_more_and_none_during_a_freeze(agent: Agent, peer: Peer) -> None:
    for number in range(32):
        await agent.services.register(f"shop-{number}", peer.name, PATH, {})
    with pytest.raises(Busy, match="32 writers"):
        await agent.services.register("shop", peer.name, PATH, {})
    agent.services.unregister("shop-0", peer.name)
    agent.is_frozen = True
    with pytest.raises(Frozen):
        await agent.services.register("shop", peer.name, PATH, {})
    agent.is_frozen = False
    await agent.services.register("shop", peer.name, PATH, {})
    await agent.services.register("shop", peer.name, PATH, {"level": "system"})  # anew
    assert len(agent.services.writers()) == 32


async def test_who_leaves_the_bus_is_forgotten_and_lost_to_the_freeze_it_was_in(
    agent: Agent, peer: Peer, real: PrivateBus, markers: Path
) -> None:
    writer = await agent.prepare(peer)
    await writer.ask("freeze", timeout_s=DEADLINE_S)
    peer.leave()
    while agent.services.writers():  # noqa: ASYNC110 - nobody tells of it
        await asyncio.sleep(0)
    async with Peer(real.path) as next_one:
        await agent.services.register("shop", next_one.name, PATH, {})
        with pytest.raises(WriterEnded, match="has left the bus"):
            await writer.ask("thaw", timeout_s=DEADLINE_S)
        await writer.force_abort(timeout_s=DEADLINE_S)
        assert list(markers.iterdir()) == []
        assert next_one.asked.empty()
    with pytest.raises(BusError, match="has left the bus"):
        await agent.services.register("late", peer.name, PATH, {})


async def test_who_leaves_the_bus_while_it_is_asked_is_gone_at_once(agent: Agent, peer: Peer) -> None:
    writer = await agent.prepare(peer)
    peer.is_silent = True
    asking = asyncio.create_task(writer.ask("freeze", timeout_s=DEADLINE_S))
    await peer.take(1)
    peer.leave()
    with pytest.raises(WriterEnded):
        await asking
    await writer.force_abort(timeout_s=DEADLINE_S)


async def test_who_does_not_answer_is_told_to_abort_once(agent: Agent, peer: Peer, markers: Path) -> None:
    writer = await agent.prepare(peer)
    peer.is_silent = True
    with pytest.raises(WriterTimedOut, match=r"did not answer Freeze within 0.1 s"):
        await writer.ask("freeze", timeout_s=SHORT_S)
    peer.is_silent = False
    await writer.force_abort(timeout_s=DEADLINE_S)
    with pytest.raises(WriterFailed, match="it was told"):
        await writer.force_abort(timeout_s=DEADLINE_S)
    assert await peer.take(2) == ["Freeze", "Abort"]
    assert peer.asked.empty()
    assert list(markers.iterdir()) == []


@pytest.mark.parametrize("verb", ["thaw", "abort"])
async def test_who_does_not_answer_when_told_that_it_is_over_is_told_nothing_more(
    agent: Agent, peer: Peer, verb: Any
) -> None:
    writer = await agent.prepare(peer)
    peer.is_silent = True
    with pytest.raises(WriterTimedOut):
        await writer.ask(verb, timeout_s=SHORT_S, reason=None)
    with pytest.raises(WriterFailed, match="does not answer"):
        await writer.force_abort(timeout_s=DEADLINE_S)
    assert await peer.take(1) == [verb.capitalize()]
    assert peer.asked.empty()


async def test_a_marker_that_cannot_be_written_is_no_prepare(agent: Agent, peer: Peer, markers: Path) -> None:
    markers.touch()
    await agent.services.register("shop", peer.name, PATH, {})
    (writer,) = agent.services.writers()
    with pytest.raises(WriterFailed, match="cannot write"):
        await writer.ask("prepare", timeout_s=DEADLINE_S, **PREPARE)
    assert peer.asked.empty()


# Agents and buses that go


async def test_the_next_agent_aborts_what_was_prepared_once_and_after_the_thaw(
    real: PrivateBus, peer: Peer, markers: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "ballast")
    async with asyncio.timeout(2 * DEADLINE_S):
        async with Agent(real, markers) as killed:
            await killed.prepare(peer)
        (markers / "half").write_text("{")
        async with Agent(real, markers) as thawing:
            assert thawing.services.writers() == []  # it has to register again
            await thawing.services.register("shop", peer.name, PATH, {})
            assert peer.asked.empty()
            thawing.thawed.set()
            asked = await peer.asked.get()
            assert (asked.member, asked.signature, asked.body) == (
                "Abort",
                "sts",
                ["x", 60_000, "the agent was restarted"],
            )
            while not any("was undone" in message for message in caplog.messages):  # noqa: ASYNC110
                await asyncio.sleep(0)
        assert list(markers.iterdir()) == []
        async with Agent(real, markers) as third:
            third.thawed.set()
            await third.prepare(peer)
    assert peer.asked.empty()


async def test_the_next_agent_leaves_alone_who_is_gone(real: PrivateBus, peer: Peer, markers: Path) -> None:
    async with asyncio.timeout(2 * DEADLINE_S):
        async with Agent(real, markers) as killed, Peer(real.path) as leaving:
            leaving.answers = dict(ANSWERS)
            await killed.prepare(leaving)
        async with Agent(real, markers) as thawing:
            thawing.thawed.set()
            await thawing.prepare(peer)
        assert [one.name for one in markers.iterdir()] == ["shop"]
        real.stop()
        real.start()
        async with Peer(real.path) as stranger, Agent(real, markers) as other_bus:
            assert stranger.name == peer.name  # names begin anew
            other_bus.thawed.set()
            while list(markers.iterdir()):  # noqa: ASYNC110 - nobody tells of it
                await asyncio.sleep(0)
            await other_bus.prepare(stranger)
            assert stranger.asked.empty()


@pytest.mark.parametrize("is_back_in_time", [False, True])
async def test_an_agent_that_lost_the_bus_aborts_when_it_is_back(
    agent: Agent, peer: Peer, markers: Path, *, is_back_in_time: bool
) -> None:
    writer = await agent.prepare(peer)
    await writer.ask("freeze", timeout_s=DEADLINE_S)
    assert await peer.take(1) == ["Freeze"]
    await agent.leave_bus()
    if is_back_in_time:
        await agent.join_bus()
    with pytest.raises(WriterEnded, match="the bus was lost"):
        await writer.ask("thaw", timeout_s=DEADLINE_S)
    with contextlib.suppress(WriterFailed):
        await writer.force_abort(timeout_s=DEADLINE_S)
    if not is_back_in_time:
        assert [one.name for one in markers.iterdir()] == ["shop"]
        await agent.join_bus()
    assert await peer.take(1) == ["Abort"]
    assert list(markers.iterdir()) == []
    assert agent.services.writers() == []
    await agent.prepare(peer)
    assert peer.asked.empty()
