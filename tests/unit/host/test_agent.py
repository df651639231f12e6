"""The client against a fake agent: what it sends and reads, and that it never hangs."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from ballast.host.agent import Agent
from ballast.host.connect import NoAnswer, PeerGone
from ballast.host.connection import EVENTS_LIMIT, NotUnderstood
from ballast.host.qga import CommandInfo, GuestInfo, MemoryBlock, MemoryBlockInfo, MemoryBlockResult
from ballast.wire import errors
from ballast.wire.memory_names import BlockResult, DemandInterval, MemoryStatus, OnlineResult, PsiTrigger
from ballast.wire.names import AgentStatus, QuiesceBegun, QuiesceEnded, QuiesceRenewed, QuiesceStatus
from tests.unit.host.fake import DEADLINE_S, ENDED, FakeAgent, Refusal, begun

Call = Callable[[Agent], Awaitable[Any]]


async def never(_: dict[str, Any]) -> None:
    """An answer that does not come."""
    await asyncio.get_running_loop().create_future()


@pytest.mark.parametrize(
    ("call", "command", "arguments", "answer", "result"),
    [
        (lambda a: a.guest_ping(), "guest-ping", {}, {}, None),
        (
            lambda a: a.guest_info(),
            "guest-info",
            {},
            {"version": "1", "supported_commands": [{"name": "x", "enabled": False, "success-response": True}]},
            GuestInfo("1", [CommandInfo("x", enabled=False)]),
        ),
        (
            lambda a: a.guest_get_memory_blocks(),
            "guest-get-memory-blocks",
            {},
            [{"phys-index": 3, "online": True, "can-offline": False}, {"phys-index": 4, "online": False}],
            [MemoryBlock(3, online=True, can_offline=False), MemoryBlock(4, online=False)],
        ),
        (
            lambda a: a.guest_set_memory_blocks([MemoryBlock(3, online=True)]),
            "guest-set-memory-blocks",
            {"mem-blks": [{"phys-index": 3, "online": True}]},
            [{"phys-index": 3, "response": "operation-failed", "error-code": 16}],
            [MemoryBlockResult(3, "operation-failed", 16)],
        ),
        (
            lambda a: a.guest_get_memory_block_info(),
            "guest-get-memory-block-info",
            {},
            {"size": 1 << 27},
            MemoryBlockInfo(1 << 27),
        ),
        (lambda a: a.guest_fsfreeze_status(), "guest-fsfreeze-status", {}, "thawed", "thawed"),
        (lambda a: a.guest_fsfreeze_freeze(), "guest-fsfreeze-freeze", {}, 3, 3),
        (
            lambda a: a.guest_fsfreeze_freeze_list(["/", "/var"]),
            "guest-fsfreeze-freeze-list",
            {"mountpoints": ["/", "/var"]},
            2,
            2,
        ),
        (lambda a: a.guest_fsfreeze_thaw(), "guest-fsfreeze-thaw", {}, 2, 2),
        (lambda a: a.authenticate("s3cret"), "ballast-authenticate", {"token": "s3cret"}, {}, None),
        (lambda a: a.subscribe(), "ballast-subscribe", {}, {}, None),
        (
            lambda a: a.subscribe(["BALLAST_PRESSURE"], [PsiTrigger("some", 1, 2)], DemandInterval(500)),
            "ballast-subscribe",
            {
                "events": ["BALLAST_PRESSURE"],
                "psi": [{"kind": "some", "stall-us": 1, "window-us": 2}],
                "demand": {"interval-ms": 500},
            },
            {},
            None,
        ),
        (
            lambda a: a.memory_online(512 << 20, zone="movable"),
            "ballast-memory-online",
            {"bytes": 512 << 20, "zone": "movable"},
            {"bytes": 0, "blocks": [{"phys-index": 9, "zone": "kernel", "result": "failed", "reason": "EIO"}]},
            OnlineResult(0, [BlockResult(9, "kernel", "failed", "EIO")]),
        ),
        (
            lambda a: a.quiesce_renew("i", 9000),
            "ballast-quiesce-renew",
            {"id": "i", "lease-ms": 9000},
            {"lease-ms": 9000},
            QuiesceRenewed(9000),
        ),
        (
            lambda a: a.quiesce_end("i"),
            "ballast-quiesce-end",
            {"id": "i"},
            ENDED | {"held": False, "reason": "lease-expired"},
            QuiesceEnded(False, 1234.5, 3.5, "lease-expired", [], []),
        ),
    ],
)
async def test_each_method_asks_and_reads_as_the_protocol_says(
    fake: FakeAgent, call: Call, command: str, arguments: dict[str, Any], answer: Any, result: Any
) -> None:
    fake.answers[command] = answer
    async with Agent.connect(fake.target) as agent:
        assert await call(agent) == result
    assert fake.asked[-1] == (command, arguments)


async def test_records_are_read_and_unknown_fields_ignored(fake: FakeAgent) -> None:
    async with Agent.connect(fake.target) as agent:
        status = await agent.status()
        memory = await agent.memory_status()
        quiesce = await agent.quiesce_status()
        freeze = await agent.quiesce_begin("i", 5000, exclude=["/mnt/*"], level="filesystem", on_failure="degrade")
    assert isinstance(status, AgentStatus)
    assert (status.limits.lease_ms, status.pin) == (600_000, None)
    assert isinstance(memory, MemoryStatus)
    assert memory.psi is not None
    assert memory.psi.some.avg10 == 1.5
    assert quiesce == QuiesceStatus("thawed")
    assert isinstance(freeze, QuiesceBegun)
    assert freeze.filesystems[0].mountpoint == "/data"
    wanted = {"id": "i", "lease-ms": 5000, "exclude": ["/mnt/*"], "level": "filesystem", "on-failure": "degrade"}
    assert fake.asked[-1] == ("ballast-quiesce-begin", wanted)


@pytest.mark.parametrize("answer", [None, 5, "x", [], {}, {"version": 5}])
async def test_an_answer_in_no_known_form_is_told(fake: FakeAgent, answer: Any) -> None:
    fake.answers["ballast-agent-status"] = answer
    async with Agent.connect(fake.target) as agent:
        with pytest.raises(NotUnderstood, match="cannot read the answer to ballast-agent-status"):
            await agent.status()
        await agent.guest_ping()


@pytest.mark.parametrize(
    ("refusal", "kind"),
    [
        (Refusal("busy", data={"id": "x", "desc": "y"}), errors.Busy),
        (Refusal("unauthenticated"), errors.Unauthenticated),
        (Refusal("frozen", wire_class="CommandNotFound"), errors.Frozen),
        (Refusal("refused-by-policy", wire_class="CommandNotFound"), errors.Refused),
        (Refusal(None, wire_class="CommandNotFound"), errors.CommandNotFound),
        (Refusal("bad-argument"), errors.BadRequest),
        (Refusal("of-the-future"), errors.AgentError),
        (Refusal(), errors.AgentError),
    ],
)
async def test_what_the_agent_refuses_raises_the_class_of_its_reason(
    fake: FakeAgent, refusal: Refusal, kind: type[errors.AgentError]
) -> None:
    fake.answers["guest-ping"] = refusal
    async with Agent.connect(fake.target) as agent:
        with pytest.raises(errors.AgentError, match="no") as caught:
            await agent.guest_ping()
    assert type(caught.value) is kind


async def test_answers_are_matched_by_id_in_any_order(fake: FakeAgent) -> None:
    first: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    fake.answers |= {"first": lambda _: first, "second": "2"}
    async with Agent.connect(fake.target) as agent:
        waiting = asyncio.create_task(agent.call("first"))
        await fake.wait_for("first")
        assert await agent.call("second") == "2"
        first.set_result("1")
        assert await waiting == "1"


async def test_a_call_without_an_answer_ends_at_its_deadline_and_the_late_answer_is_dropped(fake: FakeAgent) -> None:
    late: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    fake.answers |= {"slow": lambda _: late, "next": "mine"}
    async with Agent.connect(fake.target) as agent:
        with pytest.raises(NoAnswer, match=r"no answer to slow within 0\.01 s"):
            await agent.call("slow", timeout_s=0.01)
        late.set_result("late")
        assert await agent.call("next") == "mine"


async def test_a_lost_connection_ends_every_waiting_call_and_each_after_it(fake: FakeAgent) -> None:
    fake.answers["slow"] = never
    async with Agent.connect(fake.target) as agent:
        waiting = [asyncio.create_task(agent.call("slow", timeout_s=60)) for _ in range(5)]
        await fake.wait_for("slow", times=5)
        fake.drop()
        async with asyncio.timeout(DEADLINE_S):
            results = await asyncio.gather(*waiting, return_exceptions=True)
        assert [type(result) for result in results] == [PeerGone] * 5
        with pytest.raises(PeerGone):
            await agent.guest_ping()
        with pytest.raises(PeerGone):
            await anext(agent.events())


async def test_an_agent_that_reads_nothing_runs_into_the_deadline(tmp_path: Path) -> None:
    path = tmp_path / "s"
    done = asyncio.Event()

    async def sync_and_stop(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        line = (await reader.readline()).decode("latin-1")
        number, name = line.split('"id": ')[1].split("}")[0], line.rsplit('"', 2)[1]
        writer.write(f'{{"return": {number}, "id": "{name}"}}\n'.encode())
        await done.wait()
        writer.transport.abort()

    async with await asyncio.start_unix_server(sync_and_stop, path):
        async with Agent.connect(f"unix:{path}", timeout_s=2.0) as agent:
            for _ in range(5):
                with pytest.raises(NoAnswer):
                    await agent.call("x", {"text": "x" * 1_000_000}, timeout_s=0.01)
        done.set()


async def test_a_request_too_long_for_the_agent_is_not_sent(fake: FakeAgent) -> None:
    async with Agent.connect(fake.target) as agent:
        with pytest.raises(errors.BadRequest, match="longer than"):
            await agent.call("x", {"text": "x" * (1 << 20)})
        await agent.guest_ping()
    assert fake.count("x") == 0


@pytest.mark.parametrize(
    "garbage",
    [
        b'{"return": {"half',
        b'{"return": "it\'s',
        b'{"return": 7, "id": 1}\n{"error": {"class": "GenericError", "desc": "x"}, "id": "old-1"}\n',
        b"\xff\xff\n\n\xfe\x00}}}",
        b"[" * 100_000,
        b"x" * 1_000_000,
        b'{"event": "BALLAST_PRESSURE", "data": {}, "seq": 9, "timestamp": {"seconds": 1, "microseconds": 1}}\n',
    ],
)
async def test_what_was_left_in_the_channel_confuses_nobody(fake: FakeAgent, garbage: bytes) -> None:
    fake.greeting = garbage
    async with Agent.connect(fake.target) as agent:
        await agent.guest_ping()
        fake.send_event(1, level="low")
        async with asyncio.timeout(DEADLINE_S):
            assert (await anext(agent.events())).data == {"level": "low"}


@pytest.mark.parametrize(
    "noise",
    [b"5\n", b"null\n", b"{}\n", b'{"return": 1, "id": [1]}\n', b'{"event": 5}\n', b"\xff", b'{"error": 1, "id": 1}'],
)
async def test_noise_between_answers_is_ignored(fake: FakeAgent, noise: bytes) -> None:
    async with Agent.connect(fake.target) as agent:
        fake.send(noise)
        await agent.guest_ping()


async def test_a_silent_agent_is_no_answer(fake: FakeAgent) -> None:
    fake.answers["guest-sync-delimited"] = never
    with pytest.raises(NoAnswer, match="connected, but no agent answers"):
        async with Agent.connect(fake.target, timeout_s=0.05):
            pass


async def test_a_sync_that_was_lost_is_sent_again(fake: FakeAgent, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ballast.host.connection.SYNC_RETRY_S", 0.05)
    fake.answers["guest-sync-delimited"] = lambda arguments: (
        arguments["id"] if fake.count("guest-sync-delimited") > 1 else never({})
    )
    async with Agent.connect(fake.target) as agent:
        await agent.guest_ping()
    assert fake.count("guest-sync-delimited") == 2


async def test_a_wrong_sync_is_told(fake: FakeAgent) -> None:
    fake.answers["guest-sync-delimited"] = -1
    with pytest.raises(NotUnderstood, match="guest-sync-delimited returned -1"):
        async with Agent.connect(fake.target):
            pass


async def test_a_token_is_given_before_anything_else_is_asked(fake: FakeAgent) -> None:
    async with Agent.connect(fake.target, token="s3cret") as agent:
        await agent.guest_ping()
    assert [name for name, _ in fake.asked] == ["guest-sync-delimited", "ballast-authenticate", "guest-ping"]


async def test_a_wrong_token_is_unauthenticated(fake: FakeAgent) -> None:
    fake.answers["ballast-authenticate"] = Refusal("unauthenticated", "wrong token")
    with pytest.raises(errors.Unauthenticated, match="wrong token"):
        async with Agent.connect(fake.target, token="s3cret"):
            pass


async def test_events_come_in_order_beside_answers(fake: FakeAgent) -> None:
    async with Agent.connect(fake.target) as agent:
        await agent.subscribe()
        events = agent.events()
        for seq in (1, 2, 3):
            fake.send_event(seq, level="low")
        await agent.guest_ping()
        async with asyncio.timeout(DEADLINE_S):
            taken = [await anext(events) for _ in range(3)]
    assert [event.seq for event in taken] == [1, 2, 3]
    assert taken[0].timestamp_us == 1_700_000_000_250_000


async def test_events_that_nobody_takes_make_room_for_newer_ones(fake: FakeAgent) -> None:
    async with Agent.connect(fake.target) as agent:
        for seq in range(1, EVENTS_LIMIT + 11):
            fake.send_event(seq)
        await agent.guest_ping()
        events = agent.events()
        first = await anext(events)
        fake.drop()
        rest = [(await anext(events)).seq for _ in range(EVENTS_LIMIT - 1)]
        with pytest.raises(PeerGone):
            await anext(events)
    assert [first.seq, *rest] == list(range(11, EVENTS_LIMIT + 11))


async def test_two_connections_share_no_id(fake: FakeAgent) -> None:
    names = []
    for _ in range(2):
        async with Agent.connect(fake.target) as agent:
            names.append(agent._session)
    assert names[0] != names[1]


async def test_a_freeze_has_longer_than_other_calls(fake: FakeAgent) -> None:
    answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    fake.answers |= {"ballast-quiesce-begin": lambda _: answer, "slow": never}
    async with Agent.connect(fake.target, timeout_s=0.2) as agent:
        freezing = asyncio.create_task(agent.quiesce_begin("i", 5000))
        await fake.wait_for("ballast-quiesce-begin")
        with pytest.raises(NoAnswer):
            await agent.call("slow")
        answer.set_result(begun({"id": "i", "lease-ms": 5000}))
        assert (await freezing).id == "i"
