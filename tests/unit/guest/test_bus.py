"""The agent's place on the bus: kept whatever the bus does, and whatever strangers send over it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from dbus_next import SignatureTree

from ballast.guest import bus_connection
from ballast.guest.bus import Bus, Call, Handler
from ballast.guest.bus_connection import QUEUE_BYTES
from tests.unit.guest.fake_bus import FakeBus, answer, call, signal
from tests.unit.guest.private_bus import DEADLINE_S, PrivateBus

NAME = "org.ballast.Agent1"
PAUSE_S = 0.001
Run = Callable[..., Bus]


class Calls:
    """What the agent would have to do."""

    def __init__(self) -> None:
        self.calls: asyncio.Queue[Call] = asyncio.Queue()
        self.is_frozen = False


@pytest.fixture
def calls() -> Calls:
    return Calls()


@pytest.fixture
async def run(calls: Calls) -> AsyncIterator[Run]:
    """Keep an agent on the bus at that path."""
    tasks: list[asyncio.Task[None]] = []

    def start(path: Path, handle: Handler = calls.calls.put_nowait) -> Bus:
        bus = Bus(NAME, is_frozen=lambda: calls.is_frozen, path=str(path))
        tasks.append(asyncio.create_task(bus.run(handle, pause_min_s=PAUSE_S)))
        return bus

    yield start
    for task in tasks:
        assert not task.done(), "it must never end by itself"
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def test_a_bus_that_is_not_there_is_told_of_once_and_found_when_it_comes(
    tmp_path: Path, run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "ballast")
    path = tmp_path / "bus"
    bus = run(path)
    bus.emit("/a", "a.b", "C", "s", "nobody hears it")
    while not caplog.messages:  # noqa: ASYNC110 - nobody tells of it
        await asyncio.sleep(0)
    async with asyncio.timeout(DEADLINE_S), FakeBus(path) as fake:
        await fake.accept_and_name()
        while len(caplog.messages) < 2:  # noqa: ASYNC110
            await asyncio.sleep(0)
    assert caplog.messages[0].startswith("not on the bus, waiting for it: ")
    assert caplog.messages[1] == f"on the bus as {NAME}"


async def test_a_bus_that_goes_is_found_again(tmp_path: Path, run: Run) -> None:
    async with asyncio.timeout(DEADLINE_S), FakeBus(tmp_path / "bus") as fake:
        run(fake.path)
        for _ in range(3):
            _, writer = await fake.accept_and_name()
            writer.close()
        await fake.accept_and_name()


@pytest.mark.parametrize(
    "said",
    [b"", b"REJECTED EXTERNAL\r\n", b"x" * (1 << 20), b"\r\n", b"OK", b"OK 0\r\n", b"OK 0\r\n" + b"\xff" * 64],
    ids=["nothing", "rejected", "endless", "empty", "half", "no-answer", "garbage"],
)
async def test_a_bus_that_is_none_is_left_and_tried_again(
    tmp_path: Path, run: Run, caplog: pytest.LogCaptureFixture, said: bytes
) -> None:
    caplog.set_level(logging.INFO, "ballast")
    async with asyncio.timeout(DEADLINE_S), FakeBus(tmp_path / "bus") as fake:
        run(fake.path)
        for _ in range(2):
            _, writer = await fake.accept()
            writer.write(said)
            writer.close()
        await fake.accept_and_name()
    assert len(caplog.messages) == 1


async def test_a_bus_that_lets_us_not_in_is_left_at_once(tmp_path: Path, run: Run) -> None:
    async with asyncio.timeout(DEADLINE_S), FakeBus(tmp_path / "bus") as fake:
        run(fake.path)
        for _ in range(3):
            _, writer = await fake.accept()
            writer.write(b"REJECTED EXTERNAL\r\n")


async def test_a_bus_that_says_nothing_is_given_up(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bus_connection, "ANSWER_S", 0.01)
    async with asyncio.timeout(DEADLINE_S), FakeBus(tmp_path / "bus") as fake:
        run(fake.path)
        for _ in range(3):
            await fake.accept()


async def test_a_bus_that_accepts_nobody_holds_nothing_up(
    tmp_path: Path, run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "ballast")
    with socket.socket(socket.AF_UNIX) as listener, contextlib.ExitStack() as waiting:
        listener.bind(str(tmp_path / "bus"))
        listener.listen(0)
        with contextlib.suppress(BlockingIOError):  # from then on a blocking connect would wait
            while True:
                one = waiting.enter_context(socket.socket(socket.AF_UNIX))
                one.setblocking(False)
                one.connect(str(tmp_path / "bus"))
        run(tmp_path / "bus")
        async with asyncio.timeout(DEADLINE_S):
            while not caplog.messages:  # noqa: ASYNC110
                await asyncio.sleep(0)
    assert caplog.messages[0].startswith("not on the bus, waiting for it: ")


async def test_nothing_connects_while_frozen(tmp_path: Path, run: Run, calls: Calls) -> None:
    calls.is_frozen = True
    async with asyncio.timeout(DEADLINE_S), FakeBus(tmp_path / "bus") as fake:
        run(fake.path)
        for _ in range(20):
            await asyncio.sleep(PAUSE_S)
        assert fake.connections.empty()
        calls.is_frozen = False
        await fake.accept_and_name()


async def test_a_bus_that_reads_too_slowly_is_left_before_much_waits_for_it(
    tmp_path: Path, run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    async with asyncio.timeout(DEADLINE_S), FakeBus(tmp_path / "bus") as fake:
        bus = run(fake.path)
        await fake.accept_and_name()
        caplog.set_level(logging.INFO, "ballast")
        while not caplog.messages:  # noqa: ASYNC110
            await asyncio.sleep(0)
        for _ in range(2 * QUEUE_BYTES // 1000):
            bus.emit("/a", "a.b", "C", "s", "x" * 1000)
        assert caplog.messages[-1] == "the bus does not read, left"
        assert caplog.messages.count("the bus does not read, left") == 1
        await fake.accept_and_name()


async def test_no_more_calls_are_taken_in_than_the_bus_takes_answers(tmp_path: Path, run: Run) -> None:
    answered, called = 0, 3_000

    def handle(call: Call) -> None:
        nonlocal answered
        answered += call.answer("s", "x" * 1000)

    async with asyncio.timeout(DEADLINE_S), FakeBus(tmp_path / "bus") as fake:
        run(fake.path, handle)
        reader, writer = await fake.accept_and_name()
        writer.write(call("a.b", "C", "/") * called)
        before = -1
        while before != answered:
            before = answered
            for _ in range(100):
                await asyncio.sleep(0)
        assert 0 < answered < called
        for _ in range(called):
            await reader.readuntil(b"x" * 1000 + b"\0")
        assert fake.connections.empty()


async def test_a_bus_that_never_takes_the_answers_is_left(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with asyncio.timeout(DEADLINE_S), FakeBus(tmp_path / "bus") as fake:
        run(fake.path, lambda call: call.answer("s", "x" * 1000))
        _, writer = await fake.accept_and_name()
        monkeypatch.setattr(bus_connection, "ANSWER_S", 0.05)
        writer.write(call("a.b", "C", "/") * 3_000)
        await fake.accept()


async def test_strangers_leave_the_rest_of_the_agent_its_turn(tmp_path: Path, run: Run, calls: Calls) -> None:
    async with asyncio.timeout(DEADLINE_S), FakeBus(tmp_path / "bus") as fake:
        run(fake.path)
        _, writer = await fake.accept_and_name()
        writer.write(call("a.b", "C", "/") * 1000)
        turns = 0
        while calls.calls.qsize() < 1000:
            await asyncio.sleep(0)
            turns += 1
    assert turns >= 1000 // 16


async def test_what_strangers_send_does_not_pile_up(tmp_path: Path, run: Run, calls: Calls) -> None:
    before = len(SignatureTree._cache)
    async with asyncio.timeout(DEADLINE_S), FakeBus(tmp_path / "bus") as fake:
        run(fake.path)
        _, writer = await fake.accept_and_name()
        for number in range(600):
            writer.write(signal(f"({number:b})".replace("0", "i").replace("1", "u"), bytes(8)))
        writer.write(answer(77, 1))  # and this was never asked
        writer.write(call("a.b", "C", "/"))
        await calls.calls.get()
    assert len(SignatureTree._cache) - before <= 300


async def test_what_is_too_long_or_malformed_is_passed_over(tmp_path: Path, run: Run, calls: Calls) -> None:
    mebi = 1 << 20
    malformed = bytearray(call("a.b", "M", "/"))
    malformed[1] = 99  # a type that no message has
    async with asyncio.timeout(DEADLINE_S), FakeBus(tmp_path / "bus") as fake:
        run(fake.path)
        _, writer = await fake.accept_and_name()
        writer.write(malformed)
        writer.write(call("a.b", "Header", "/" + "x" * mebi))
        writer.write(call("a.b", "Body", "/", signature="s", body=mebi.to_bytes(4, "little") + bytes(mebi + 1)))
        writer.write(call("a.b", "Lie", "/", signature="s", body=(99).to_bytes(4, "little") + b"\0"))
        writer.write(call("a.b", "Good", "/", signature="s", body=(1).to_bytes(4, "little") + b"x\0"))
        body, lie, good = [await calls.calls.get() for _ in range(3)]
    assert [one.member for one in (body, lie, good)] == ["Body", "Lie", "Good"]
    with pytest.raises(ValueError, match="longer than 65536 bytes"):
        body.arguments()
    with pytest.raises(ValueError, match="malformed"):
        lie.arguments()
    assert good.arguments() == ["x"]


async def test_who_calls_is_answered_by_nobody_but_the_bus(tmp_path: Path, run: Run, calls: Calls) -> None:
    async with asyncio.timeout(DEADLINE_S), FakeBus(tmp_path / "bus") as fake:
        run(fake.path)
        _, writer = await fake.accept_and_name()
        writer.write(call("a.b", "C", "/"))
        asking = asyncio.create_task((await calls.calls.get()).uid())
        await asyncio.sleep(0)
        writer.write(answer(3, 0, sender=":1.7") + answer(3, 1000))
        assert await asking == 1000
        writer.write(call("a.b", "C", "/"))
        asking = asyncio.create_task((await calls.calls.get()).uid())
        await asyncio.sleep(0)
        writer.close()
        with pytest.raises(ConnectionError):
            await asking


async def test_an_answer_that_nobody_can_get_is_told(tmp_path: Path, run: Run, calls: Calls) -> None:
    async with asyncio.timeout(DEADLINE_S), FakeBus(tmp_path / "bus") as fake:
        run(fake.path)
        _, writer = await fake.accept_and_name()
        writer.write(call("a.b", "C", "/") + call("a.b", "C", "/", flags=1))
        wanted, unwanted = await calls.calls.get(), await calls.calls.get()
        assert wanted.answer("s", "x")
        assert not unwanted.answer("s", "x")
        writer.close()
        await fake.accept_and_name()
        assert not wanted.answer("s", "x")


async def test_the_name_is_the_agents_by_policy_and_only_while_it_is_free(
    tmp_path: Path, run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "ballast")
    real = PrivateBus(tmp_path, policy="<busconfig/>")
    try:
        run(real.path)
        async with asyncio.timeout(DEADLINE_S):
            while not caplog.messages:  # noqa: ASYNC110
                await asyncio.sleep(0)
        assert "org.freedesktop.DBus.Error.AccessDenied" in caplog.messages[0]
    finally:
        real.stop()
    caplog.clear()
    real = PrivateBus(tmp_path)
    try:
        await real.wait_name()
        run(real.path)
        async with asyncio.timeout(DEADLINE_S):
            while f"somebody else is {NAME}" not in caplog.text:  # noqa: ASYNC110
                await asyncio.sleep(0)
    finally:
        real.stop()
