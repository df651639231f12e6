"""The guard by itself, spoken to as an agent would; on loop devices of our own."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from ballast.guest.quiesce import guard_protocol as protocol
from tests.kernel.conftest import GuardProcess, LoopFs, MakeLoopFs
from tests.kernel.test_linux import DEADLINE_S, opened
from tests.kernel.test_quiesce import Writer, is_frozen


class Agent:
    """A connection to the guard."""

    def __init__(self, guard: GuardProcess) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.settimeout(DEADLINE_S)
        self.socket.connect(str(guard.socket_path))

    def receive(self) -> dict[str, Any] | None:
        """The next message; None when the guard hung up."""
        try:
            return protocol.receive(self.socket)[0]
        except ConnectionResetError:
            return None

    def wait_for(self, event: str) -> dict[str, Any]:
        """Pass over others."""
        while (message := self.receive()) is not None:
            if message["event"] == event:
                return message
        raise AssertionError(f"the guard hung up before {event!r}")

    def freeze(self, *filesystems: LoopFs, lease_s: float = 30) -> None:
        """Freeze them on one level, and wait until they are."""
        with contextlib.ExitStack() as stack:
            fds = [stack.enter_context(opened(filesystem.path)) for filesystem in filesystems]
            levels = [list(range(len(fds)))]
            expires_s = protocol.boottime_s() + lease_s
            protocol.send(self.socket, {"op": "freeze", "levels": levels, "expires_s": expires_s}, fds)
        self.wait_for("frozen")


@pytest_asyncio.fixture
async def agent(guard: GuardProcess) -> AsyncIterator[Agent]:
    made = Agent(guard)
    hello = made.receive()
    assert hello == {"event": "hello", "version": protocol.VERSION, "pid": guard.process.pid}
    yield made
    made.socket.close()


async def blocked_writer(filesystem: LoopFs) -> Writer:
    """Proof that it is frozen."""
    writer = Writer(filesystem)
    await writer.wait_blocked()
    return writer


async def wait_done(writer: Writer, *, within_s: float) -> None:
    """Proof that it is thawed."""
    assert await asyncio.to_thread(writer.process.wait, within_s) == 0


async def test_second_client_while_one_holds_is_told_busy(
    make_loop_fs: MakeLoopFs, guard: GuardProcess, agent: Agent
) -> None:
    filesystem = make_loop_fs()
    agent.freeze(filesystem)
    second = Agent(guard)
    with second.socket:
        assert second.receive() == {"event": "busy"}
        assert second.receive() is None
    assert is_frozen(filesystem)
    protocol.send(agent.socket, {"op": "thaw"})
    assert agent.wait_for("thawed")["cause"] == "thaw"
    agent.wait_for("idle")
    assert not is_frozen(filesystem)


async def test_a_client_that_holds_nothing_gives_way(
    make_loop_fs: MakeLoopFs, guard: GuardProcess, agent: Agent
) -> None:
    second = Agent(guard)
    with second.socket:
        assert second.wait_for("hello")
        assert agent.receive() is None
        second.freeze(make_loop_fs())


async def test_the_agent_s_socket_closing_thaws_at_once(
    make_loop_fs: MakeLoopFs, guard: GuardProcess, agent: Agent
) -> None:
    filesystems = [make_loop_fs("ext4"), make_loop_fs("xfs")]
    agent.freeze(*filesystems)
    writers = [await blocked_writer(filesystem) for filesystem in filesystems]
    agent.socket.close()
    for writer in writers:
        await wait_done(writer, within_s=1)
    assert guard.process.poll() is None


async def test_sigterm_thaws_and_exits_0(make_loop_fs: MakeLoopFs, guard: GuardProcess, agent: Agent) -> None:
    filesystem = make_loop_fs()
    agent.freeze(filesystem)
    writer = await blocked_writer(filesystem)
    guard.process.terminate()
    await wait_done(writer, within_s=1)
    assert agent.wait_for("thawed")["cause"] == "stopped"
    assert await asyncio.to_thread(guard.process.wait, DEADLINE_S) == 0


async def test_lease_end_thaws_though_nobody_asks_and_a_renewal_moves_it(
    make_loop_fs: MakeLoopFs, agent: Agent
) -> None:
    filesystem = make_loop_fs()
    agent.freeze(filesystem, lease_s=600)
    writer = await blocked_writer(filesystem)
    protocol.send(agent.socket, {"op": "renew", "expires_s": protocol.boottime_s() + 0.2})
    agent.wait_for("renewed")
    await wait_done(writer, within_s=1)
    assert agent.wait_for("thawed") == {
        "event": "thawed",
        "cause": "lease",
        "filesystems": [{"state": "thawed", "errno": 0, "freeze_ms": pytest.approx(500, abs=500)}],
    }


NONSENSE = [
    b"garbage",
    b"\xff",
    b"5",
    b"{}",
    b'{"op": "renew"}',
    b'{"op": "renew", "expires_s": "soon"}',
    b'{"op": "renew", "expires_s": null}',
]


@pytest.mark.parametrize("nonsense", NONSENSE)
async def test_nonsense_while_frozen_thaws_and_the_guard_lives(
    make_loop_fs: MakeLoopFs, guard: GuardProcess, agent: Agent, nonsense: bytes
) -> None:
    filesystem = make_loop_fs()
    agent.freeze(filesystem)
    writer = await blocked_writer(filesystem)
    agent.socket.send(nonsense)
    await wait_done(writer, within_s=1)
    await serves_on(guard)


NONSENSE_ORDERS: list[dict[str, Any]] = [
    {"levels": [[5]], "expires_s": 0},
    {"levels": 5, "expires_s": 0},
    {"levels": [["x"]], "expires_s": 0},
    {"levels": [[0]]},
    {"expires_s": 0},
    {"levels": [[0]], "expires_s": "never"},
]


@pytest.mark.parametrize("order", NONSENSE_ORDERS, ids=repr)
async def test_an_order_that_makes_no_sense_freezes_nothing_and_leaves_nothing(
    make_loop_fs: MakeLoopFs, guard: GuardProcess, agent: Agent, order: dict[str, Any]
) -> None:
    filesystem = make_loop_fs()
    with opened(filesystem.path) as fd:
        protocol.send(agent.socket, {"op": "freeze"} | order, [fd])
    while agent.receive() is not None:
        pass
    assert not is_frozen(filesystem)
    await serves_on(guard)


async def serves_on(guard: GuardProcess) -> None:
    """The guard is there for the next agent."""
    async with asyncio.timeout(DEADLINE_S):
        while True:
            with (following := Agent(guard)).socket:
                message = following.receive()
            assert guard.process.poll() is None
            if message and message["event"] == "hello":
                return
            await asyncio.sleep(0.01)  # it says busy until its threads have ended


async def test_nothing_of_a_session_stays_in_the_guard(
    make_loop_fs: MakeLoopFs, guard: GuardProcess, agent: Agent
) -> None:
    filesystem = make_loop_fs()
    process = Path(f"/proc/{guard.process.pid}")
    descriptors = []
    for _ in range(3):
        agent.freeze(filesystem)
        protocol.send(agent.socket, {"op": "thaw"})
        agent.wait_for("idle")
        descriptors.append(len(list((process / "fd").iterdir())))
        # The thread that told of the end may be about to end itself.
        assert len(list((process / "task").iterdir())) <= 2
    assert descriptors == descriptors[:1] * 3
