"""Peers over real sockets: order, patience and bounds."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import pytest_asyncio

from ballast.guest.dispatch import Table, command
from ballast.guest.peer import Peer
from ballast.wire.message import Event
from tests.unit.guest.served import BOUNDS, DEADLINE_S, Served

# More than a UNIX socket and asyncio's own buffer take together.
MUCH_BYTES = 1 << 20


class Topic:
    """What these tests ask for."""

    def __init__(self) -> None:
        self.go = asyncio.Event()
        self.waiting = asyncio.Event()
        self.ran: list[int] = []
        self.peers: list[Peer] = []

    @command("number")
    async def number(self, *, n: int) -> int:
        self.ran.append(n)
        return n

    @command("wait")
    async def wait(self) -> str:
        self.waiting.set()
        await self.go.wait()
        return "waited"

    @command("much")
    async def much(self) -> str:
        return "x" * MUCH_BYTES

    @command("enter")
    async def enter(self, peer: Peer) -> str:
        self.peers.append(peer)
        return peer.origin

    @command("leave")
    async def leave(self, peer: Peer) -> str:
        peer.close_after_reply()
        return "bye"

    @command("fail-outside")
    async def fail_outside(self) -> object:
        return {object()}  # no JSON: the reply cannot be sent


def open_descriptors() -> int:
    """How many this process has."""
    return len(list(Path("/proc/self/fd").iterdir()))


class Agent(Served):
    """With the topic of these tests."""

    def __init__(self, folder: Path, *, most: int) -> None:
        self.topic = Topic()
        table = Table(is_frozen=lambda: False)
        table.add(self.topic)
        super().__init__(folder, table, most=most)


MakeAgent = Callable[..., Agent]


@pytest_asyncio.fixture
async def make_agent(tmp_path: Path) -> AsyncIterator[MakeAgent]:
    agents: list[Agent] = []

    def make(*, most: int = 8) -> Agent:
        agents.append(Agent(tmp_path, most=most))
        return agents[-1]

    yield make
    for agent in agents:
        await agent.close()


async def test_pipelined_requests_are_answered_in_order(make_agent: MakeAgent) -> None:
    agent = make_agent()
    client = await agent.connect()
    for n in range(1000):
        client.send("number", n=n)
    assert [(await client.receive())["return"] for _ in range(1000)] == list(range(1000))
    assert agent.topic.ran == list(range(1000))


async def test_a_request_in_pieces_and_nonsense_between_leave_the_order(make_agent: MakeAgent) -> None:
    client = await make_agent().connect()
    client.writer.write(b'nonsense\n{"execute": "num')
    assert "error" in await client.receive()
    client.writer.write(b'ber", "arguments": {"n": 5}}')
    assert (await client.receive()) == {"return": 5}


async def test_a_slow_command_holds_up_its_own_peer_only(make_agent: MakeAgent) -> None:
    agent = make_agent()
    slow, quick = await agent.connect(), await agent.connect()
    slow.send("wait")
    slow.send("number", n=1)
    await agent.topic.waiting.wait()
    assert await quick.ask("number", n=2) == 2
    assert agent.topic.ran == [2]
    agent.topic.go.set()
    assert [(await slow.receive())["return"] for _ in range(2)] == ["waited", 1]


async def test_a_peer_that_does_not_read_its_answers_is_dropped(
    make_agent: MakeAgent, caplog: pytest.LogCaptureFixture
) -> None:
    agent = make_agent()
    deaf, fine = await agent.connect(), await agent.connect()
    deaf.writer.transport.pause_reading()  # type: ignore[attr-defined]
    for _ in range(100):
        deaf.send("much")
    deaf.send("number", n=1)
    assert await fine.ask("number", n=2) == 2
    await agent.wait_peers(1)
    assert agent.topic.ran == [2]
    assert "test does not read its answers, dropped" in caplog.messages


async def test_a_dropped_peer_leaves_nothing_behind(make_agent: MakeAgent) -> None:
    """Nor does one that hung up its sending half only, and never reads what was sent before."""
    agent = make_agent()
    before = open_descriptors()
    with socket.socket(socket.AF_UNIX) as deaf, socket.socket(socket.AF_UNIX) as half:
        for sock in (deaf, half):
            sock.setblocking(False)
            await asyncio.get_running_loop().sock_connect(sock, str(agent.path))
        deaf.send(b'{"execute": "much"}\n' * 100)
        half.send(b'{"execute": "enter"}\n' * 10_000)
        half.shutdown(socket.SHUT_WR)
        await agent.wait_peers(2)
        await agent.wait_peers(0)
        await asyncio.sleep(0)  # a dropped connection is closed by the loop's next round
        assert open_descriptors() == before + 2


async def test_a_peer_that_does_not_read_its_events_is_dropped_at_the_bound(
    make_agent: MakeAgent, caplog: pytest.LogCaptureFixture
) -> None:
    agent = make_agent()
    client = await agent.connect()
    await client.ask("enter")
    client.writer.transport.pause_reading()  # type: ignore[attr-defined]
    (peer,) = agent.topic.peers
    event = Event("A", {"x": "x" * 1000}, 1, 0)
    sent = 0
    while peer.deliver(event):
        sent += 1
    # Nothing has run in between: what was not taken by the socket at once was kept, up to the bound and one more.
    assert sent * 1000 < BOUNDS.queue_bytes + (1 << 20)
    assert not peer.deliver(event)
    client.writer.transport.resume_reading()  # type: ignore[attr-defined]
    await client.wait_gone()
    await agent.wait_peers(0)
    assert caplog.messages == ["test does not read its events, dropped"]


async def test_events_come_between_answers_and_never_within(make_agent: MakeAgent) -> None:
    agent = make_agent()
    client = await agent.connect()
    await client.ask("enter")
    client.send("wait")
    await agent.topic.waiting.wait()
    assert agent.topic.peers[0].deliver(Event("A", {}, 1, 1_500_000))
    assert await client.receive() == {
        "event": "A",
        "data": {},
        "seq": 1,
        "timestamp": {"seconds": 1, "microseconds": 500_000},
    }
    agent.topic.go.set()
    assert await client.receive() == {"return": "waited"}


async def test_close_after_reply_sends_the_reply_and_reads_no_further(make_agent: MakeAgent) -> None:
    agent = make_agent()
    client = await agent.connect()
    client.send("leave")
    client.send("number", n=1)
    assert await client.receive() == {"return": "bye"}
    assert await client.reader.read() == b""
    assert agent.topic.ran == []


async def test_resources_end_with_the_connection(make_agent: MakeAgent) -> None:
    agent = make_agent()
    client = await agent.connect()
    await client.ask("enter")
    ended = asyncio.Event()
    agent.topic.peers[0].resources.callback(ended.set)
    client.writer.transport.abort()
    async with asyncio.timeout(DEADLINE_S):
        await ended.wait()
    await agent.wait_peers(0)
    assert not agent.topic.peers[0].deliver(Event("A", {}, 1, 0))


async def test_one_peer_too_many_is_turned_away_and_has_room_later(
    make_agent: MakeAgent, caplog: pytest.LogCaptureFixture
) -> None:
    agent = make_agent(most=1)
    first = await agent.connect()
    await first.ask("number", n=1)
    await (await agent.connect()).wait_gone()
    assert caplog.messages == ["test turned away: 1 peers are connected"]
    assert await first.ask("number", n=2) == 2
    first.writer.close()
    await agent.wait_peers(0)
    assert await (await agent.connect()).ask("number", n=3) == 3


async def test_a_bug_in_one_peer_s_handling_ends_only_that_peer(
    make_agent: MakeAgent, caplog: pytest.LogCaptureFixture
) -> None:
    agent = make_agent()
    unlucky, fine = await agent.connect(), await agent.connect()
    unlucky.send("fail-outside")
    await unlucky.wait_gone()
    assert await fine.ask("number", n=1) == 1
    assert caplog.messages == ["test: internal error, dropped"]


async def test_stopping_ends_all_connections_at_once(make_agent: MakeAgent, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    agent = make_agent()
    client = await agent.connect()
    client.send("wait")
    await agent.topic.waiting.wait()
    agent.task.cancel()
    await client.wait_gone()
    assert len(agent.peers) == 0
    assert not caplog.messages
