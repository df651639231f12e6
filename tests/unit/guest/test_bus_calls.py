"""What the agent asks of others on the bus: answered by whom it asked and nobody else, in time or not at all."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from ballast.guest.bus import Bus, BusError, Call
from ballast.guest.bus_connection import BODY_LIMIT_BYTES
from tests.unit.guest.bus_peer import Peer
from tests.unit.guest.fake_bus import FakeBus, answer, owner_changed
from tests.unit.guest.private_bus import DEADLINE_S, PrivateBus

NAME = "org.ballast.Agent1"
WRITER = "org.ballast.Writer1"


@contextlib.asynccontextmanager
async def running(path: Path) -> AsyncIterator[Bus]:
    """An agent on the bus at that path; connected as soon as there is one."""

    def refuse(call: Call) -> None:
        call.refuse("a.B", "nobody is called here")

    bus = Bus(NAME, is_frozen=lambda: False, path=str(path))
    task = asyncio.create_task(bus.run(refuse, pause_min_s=0.001))
    try:
        async with asyncio.timeout(DEADLINE_S):
            yield bus
    finally:
        assert not task.done()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@pytest.fixture
def real(tmp_path: Path) -> Iterator[PrivateBus]:
    bus = PrivateBus(tmp_path)
    yield bus
    bus.stop()


async def freeze(bus: Bus, peer: Peer, *, timeout_s: float = DEADLINE_S) -> list[Any]:
    return await bus.call(peer.name, "/shop", WRITER, "Freeze", "st", "x", 5000, returns="a{sv}", timeout_s=timeout_s)


async def test_a_peer_is_called_and_answers(real: PrivateBus) -> None:
    async with running(real.path) as bus, Peer(real.path) as peer:
        await bus.wait_connected()
        peer.answer = "a{sv}", [{}]
        assert await freeze(bus, peer) == [{}]
        asked = await peer.asked.get()
        assert (asked.path, asked.interface, asked.member, asked.body) == ("/shop", WRITER, "Freeze", ["x", 5000])


async def test_what_goes_wrong_with_a_call_is_told_apart(real: PrivateBus) -> None:
    async with running(real.path) as bus, Peer(real.path) as peer:
        with pytest.raises(ConnectionError):
            await freeze(Bus(NAME, is_frozen=lambda: False), peer)
        await bus.wait_connected()
        peer.error = "org.ballast.Error.Retryable"
        with pytest.raises(BusError, match="no, not now") as refused:
            await freeze(bus, peer)
        assert (refused.value.name, refused.value.text) == (peer.error, "no, not now")
        peer.error = ""
        with pytest.raises(BusError, match=r"Freeze returns 'a\{sv\}', not ''"):
            await freeze(bus, peer)
        peer.answer = "s", ["x" * BODY_LIMIT_BYTES]
        with pytest.raises(BusError, match="longer than 65536 bytes"):
            await freeze(bus, peer)
        peer.is_silent = True
        with pytest.raises(TimeoutError):
            await freeze(bus, peer, timeout_s=0.01)
        waiting = asyncio.create_task(freeze(bus, peer))
        await peer.take(5)
        peer.leave()
        with pytest.raises(BusError) as left:
            await waiting
        assert left.value.name == "org.freedesktop.DBus.Error.NoReply"
        with pytest.raises(BusError) as unknown:
            await freeze(bus, peer)
        assert unknown.value.name == "org.freedesktop.DBus.Error.ServiceUnknown"


async def test_a_bus_that_goes_ends_what_was_asked_and_comes_back_as_another(real: PrivateBus) -> None:
    async with running(real.path) as bus, Peer(real.path) as peer:
        lost = await bus.wait_connected()
        before = bus.id
        peer.is_silent = True
        gone = await bus.watch(peer.name)
        waiting = asyncio.create_task(freeze(bus, peer))
        await peer.asked.get()
        real.stop()
        with pytest.raises(ConnectionError):
            await waiting
        await lost
        assert gone.cancelled()
        real.start()
        await bus.wait_connected()
        assert len(before) == len(bus.id) == 32
        assert before != bus.id


async def test_who_leaves_the_bus_is_noticed_once(real: PrivateBus) -> None:
    async with running(real.path) as bus, Peer(real.path) as peer, Peer(real.path) as other:
        await bus.wait_connected()
        gone, again, others = await bus.watch(peer.name), await bus.watch(peer.name), await bus.watch(other.name)
        assert gone is again
        peer.leave()
        await gone
        assert not others.done()
        with pytest.raises(BusError, match="has left the bus"):
            await bus.watch(peer.name)


async def test_rules_for_who_has_left_do_not_pile_up(tmp_path: Path) -> None:
    policy = "<busconfig><limit name='max_match_rules_per_connection'>2</limit>"
    real = PrivateBus(tmp_path, policy + "<policy context='default'><allow own='*'/></policy></busconfig>")
    try:
        async with running(real.path) as bus:
            await bus.wait_connected()
            for _ in range(5):
                async with Peer(real.path) as peer:
                    gone = await bus.watch(peer.name)
                await gone
            async with Peer(real.path) as one, Peer(real.path) as two, Peer(real.path) as three:
                await bus.watch(one.name)
                await bus.watch(two.name)
                with pytest.raises(BusError) as too_many:
                    await bus.watch(three.name)
                assert too_many.value.name == "org.freedesktop.DBus.Error.LimitsExceeded"
    finally:
        real.stop()


async def test_nobody_else_answers_or_tells_that_somebody_left(tmp_path: Path) -> None:
    async with FakeBus(tmp_path / "bus") as fake, running(fake.path) as bus:
        _, writer = await fake.accept_and_name()
        await bus.wait_connected()
        asking = asyncio.create_task(bus.call(":1.5", "/", "a.b", "C", returns="u", timeout_s=DEADLINE_S))
        watching = asyncio.create_task(bus.watch(":1.5"))
        await asyncio.sleep(0)
        writer.write(answer(3, 1, sender=":1.6") + answer(3, 2, sender="org.freedesktop.DBus"))
        writer.write(answer(3, 3, sender=":1.5") + answer(4, 0))
        assert await asking == [3]
        writer.write(answer(5, 1))
        gone = await watching
        writer.write(
            owner_changed(":1.5", "", sender=":1.6") + owner_changed(":1.6", "") + owner_changed(":1.5", ":1.5")
        )
        asking = asyncio.create_task(bus.call(":1.5", "/", "a.b", "C", returns="u", timeout_s=DEADLINE_S))
        await asyncio.sleep(0)
        writer.write(answer(6, 4, sender=":1.5"))
        assert await asking == [4]
        assert not gone.done()
        writer.write(owner_changed(":1.5", ""))
        await gone
