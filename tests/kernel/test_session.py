"""A session's edges on real file systems: what may be asked, and what a restarted agent finds."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ballast.guest.commands.quiesce import QuiesceCommands
from ballast.guest.dispatch import Table
from ballast.guest.events import Events, Subscription
from ballast.guest.quiesce import guard_protocol as protocol
from ballast.guest.quiesce.record import Open, Record, process_start, read_record, write_record
from ballast.guest.quiesce.session import Quiesce
from ballast.wire.errors import BadRequest, Busy, LeaseExpired, NoSuchId
from ballast.wire.message import Event, Reply
from tests.kernel.conftest import GuardProcess, LoopFs, MakeLoopFs
from tests.kernel.test_guard import Agent
from tests.kernel.test_linux import DEADLINE_S
from tests.kernel.test_quiesce import Writer, is_frozen
from tests.unit.guest.test_dispatch import Friend

MakeQuiesce = Callable[..., Quiesce]


# What may be asked


@pytest.mark.parametrize(
    ("session_id", "lease_ms", "mountpoints", "argument"),
    [
        ("", 1_000, None, "id"),
        ("x" * 129, 1_000, None, "id"),
        ("a", 999, None, "lease-ms"),
        ("a", 600_001, None, "lease-ms"),
        ("a", 1_000, ["/no/such/mount"], "mountpoints"),
    ],
)
async def test_a_wrong_argument_freezes_nothing(
    make_loop_fs: MakeLoopFs,
    make_quiesce: MakeQuiesce,
    session_id: str,
    lease_ms: int,
    mountpoints: list[str] | None,
    argument: str,
) -> None:
    filesystem = make_loop_fs()
    quiesce = make_quiesce(filesystem)
    with pytest.raises(BadRequest) as caught:
        await quiesce.begin(session_id, lease_ms, mountpoints=mountpoints)
    assert caught.value.data["argument"] == argument
    assert quiesce.status().state == "thawed"
    assert not is_frozen(filesystem)


async def test_only_what_was_named_or_not_excluded_is_frozen(
    make_loop_fs: MakeLoopFs, make_quiesce: MakeQuiesce
) -> None:
    one, two = make_loop_fs(), make_loop_fs()
    quiesce = make_quiesce(one, two)
    begun = await quiesce.begin("a", 30_000, mountpoints=[str(one.path)])
    assert [(result.mountpoint, result.state) for result in begun.filesystems] == [(str(one.path), "frozen")]
    assert not is_frozen(two)
    await quiesce.end("a")
    begun = await quiesce.begin("b", 30_000, exclude=[f"{one.path.parent}/*0"])
    assert {result.mountpoint: (result.state, result.reason) for result in begun.filesystems} == {
        str(two.path): ("frozen", None),
        str(one.path): ("skipped", "excluded"),
    }
    assert begun.consistency == "filesystem"
    await quiesce.end("b")


async def test_nothing_to_freeze_is_a_session_without_consistency(
    make_loop_fs: MakeLoopFs, make_quiesce: MakeQuiesce
) -> None:
    quiesce = make_quiesce(make_loop_fs())
    begun = await quiesce.begin("a", 30_000, mountpoints=[])
    assert (begun.consistency, begun.filesystems) == ("none", [])
    assert (await quiesce.end("a")).filesystems == []


async def test_status_and_events_tell_what_is(make_loop_fs: MakeLoopFs, make_quiesce: MakeQuiesce) -> None:
    events, heard = Events(), []

    def deliver(event: Event) -> bool:
        heard.append((event.data["id"], event.data["state"], event.data.get("reason")))
        return True

    events.subscribe(Subscription(frozenset({"BALLAST_QUIESCE"}), deliver))
    quiesce = make_quiesce(make_loop_fs(), events=events)
    assert not quiesce.is_frozen
    await quiesce.begin("a", 30_000)
    assert quiesce.is_frozen
    assert quiesce.guard_state() == "active"
    status = quiesce.status()
    assert (status.state, status.id) == ("frozen", "a")
    assert 0 < (status.lease_left_ms or 0) <= 30_000
    await quiesce.end("a")
    assert heard == [("a", "freezing", None), ("a", "frozen", None), ("a", "thawed", None)]


async def test_while_frozen_only_what_touches_no_disk_is_answered(
    make_loop_fs: MakeLoopFs, make_quiesce: MakeQuiesce
) -> None:
    quiesce = make_quiesce(make_loop_fs())
    table = Table(is_frozen=lambda: quiesce.is_frozen)
    table.add(QuiesceCommands(quiesce))

    async def ask(execute: str, **arguments: Any) -> Any:
        """What is returned, or the error's reason."""
        answer = await table.answer({"execute": execute, "arguments": arguments}, Friend())
        return answer.value if isinstance(answer, Reply) else answer.error.reason

    assert await ask("guest-fsfreeze-status") == "thawed"
    begun = await ask("ballast-quiesce-begin", id="a", **{"lease-ms": 30_000})
    assert (begun["consistency"], begun["lease-ms"]) == ("filesystem", 30_000)
    assert await ask("ballast-quiesce-begin", id="a", **{"lease-ms": 30_000}) == begun
    assert await ask("ballast-quiesce-begin", id="b", **{"lease-ms": 30_000}) == "busy"
    assert await ask("guest-fsfreeze-freeze") == await ask("guest-fsfreeze-freeze-list") == "frozen"
    assert await ask("guest-fsfreeze-status") == "frozen"
    assert await ask("ballast-quiesce-renew", id="a", **{"lease-ms": 20_000}) == {"lease-ms": 20_000}
    assert (await ask("ballast-quiesce-status"))["state"] == "frozen"
    assert (await ask("ballast-quiesce-end", id="a"))["held"] is True
    assert await ask("guest-fsfreeze-freeze") == 1
    assert await ask("guest-fsfreeze-thaw") == 1


async def test_a_guard_that_is_just_leaving_is_tried_again(
    make_loop_fs: MakeLoopFs, make_quiesce: MakeQuiesce, guard: GuardProcess
) -> None:
    filesystem = make_loop_fs()
    quiesce = make_quiesce(filesystem)
    away = guard.socket_path.rename(guard.socket_path.with_suffix(".away"))
    beginning = asyncio.ensure_future(quiesce.begin("a", 30_000))
    assert not (await asyncio.wait([beginning], timeout=0.2))[0]
    assert not is_frozen(filesystem)
    away.rename(guard.socket_path)
    async with asyncio.timeout(DEADLINE_S):
        await beginning
    assert (await quiesce.end("a")).held


async def test_an_end_that_overtakes_its_begin_wins(make_loop_fs: MakeLoopFs, make_quiesce: MakeQuiesce) -> None:
    quiesce = make_quiesce(make_loop_fs())
    with pytest.raises(NoSuchId):
        await quiesce.end("a")
    with pytest.raises(LeaseExpired):
        await quiesce.begin("a", 30_000)


async def test_guest_fsfreeze_thaw_ends_anybody_s_freeze_and_its_owner_hears_it(
    make_loop_fs: MakeLoopFs, make_quiesce: MakeQuiesce
) -> None:
    quiesce = make_quiesce(make_loop_fs())
    await quiesce.begin("a", 30_000)
    with pytest.raises(Busy):
        await quiesce.qga_freeze(None)
    assert await quiesce.qga_thaw() == 1
    ended = await quiesce.end("a")
    assert (ended.held, ended.reason) == (False, "thawed-by-qga")
    assert await quiesce.qga_thaw() == 0


async def test_an_agent_that_is_told_to_leave_thaws_first(make_loop_fs: MakeLoopFs, make_quiesce: MakeQuiesce) -> None:
    filesystem = make_loop_fs()
    quiesce = make_quiesce(filesystem)
    await quiesce.begin("a", 30_000)
    await quiesce.close()
    assert not is_frozen(filesystem)
    ended = await quiesce.end("a")
    assert (ended.held, ended.reason) == (False, "agent-restarted")
    await quiesce.close()  # with nothing held


# What a restarted agent finds


@pytest.fixture
def left_open(tmp_path: Path) -> Callable[..., None]:
    """Write a record of a session that nobody ended; its guard is gone unless one is named."""

    def leave(filesystem: LoopFs, *, session_id: str = "a", guard: GuardProcess | None = None) -> None:
        pid, start = (guard.process.pid, process_start(guard.process.pid)) if guard else (2**22 + 1, "1")
        listed = [{"mountpoints": [str(filesystem.path)], "device": filesystem.device}]
        write_record(tmp_path / "quiesce.json", Record(Open(session_id, pid, start, listed)))

    return leave


async def test_what_an_earlier_agent_left_frozen_is_thawed_and_did_not_hold(
    make_loop_fs: MakeLoopFs, make_quiesce: MakeQuiesce, left_open: Callable[..., None], tmp_path: Path
) -> None:
    filesystem = make_loop_fs()
    left_open(filesystem)
    subprocess.run(["fsfreeze", "--freeze", filesystem.path], check=True)
    quiesce = make_quiesce(filesystem)
    async with asyncio.timeout(DEADLINE_S):
        ended = await quiesce.end("a")
    assert (ended.held, ended.reason) == (False, "agent-restarted")
    assert [(result.mountpoint, result.state) for result in ended.filesystems] == [(str(filesystem.path), "thawed")]
    assert not is_frozen(filesystem)
    assert read_record(tmp_path / "quiesce.json").open is None
    assert await make_quiesce(filesystem).end("a") == ended  # after one more restart


async def test_guest_fsfreeze_thaw_tells_once_of_a_freeze_that_a_restart_ended(
    make_loop_fs: MakeLoopFs, make_quiesce: MakeQuiesce, left_open: Callable[..., None]
) -> None:
    filesystem = make_loop_fs()
    left_open(filesystem, session_id="qga-5")
    quiesce = make_quiesce(filesystem)
    with pytest.raises(LeaseExpired, match="agent-restarted"):
        await quiesce.qga_thaw()
    assert await quiesce.qga_thaw() == 0
    assert await make_quiesce(filesystem).qga_thaw() == 0


async def test_a_guard_that_still_holds_is_waited_for(
    make_loop_fs: MakeLoopFs, make_quiesce: MakeQuiesce, guard: GuardProcess, left_open: Callable[..., None]
) -> None:
    """The earlier agent's connection, kept open by something: its guard says busy until that goes."""
    filesystem = make_loop_fs()
    earlier = Agent(guard)
    earlier.wait_for("hello")
    earlier.freeze(filesystem)
    left_open(filesystem, guard=guard)
    quiesce = make_quiesce(filesystem)
    ending = asyncio.ensure_future(quiesce.end("a"))
    writer = Writer(filesystem)
    assert await asyncio.to_thread(writer.process.wait, DEADLINE_S) == 0  # thawed at once, all the same
    assert not ending.done()
    earlier.socket.close()
    async with asyncio.timeout(DEADLINE_S):
        assert (await ending).reason == "agent-restarted"
    await quiesce.begin("b", 30_000)
    assert (await quiesce.end("b")).held


async def test_a_spoiled_record_keeps_no_agent_from_working(
    make_loop_fs: MakeLoopFs, make_quiesce: MakeQuiesce, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "quiesce.json").write_text("{")
    quiesce = make_quiesce(make_loop_fs())
    await quiesce.begin("a", 30_000)
    assert (await quiesce.end("a")).held
    assert any("cannot read" in message for message in caplog.messages)


async def test_answers_outlive_a_restart(make_loop_fs: MakeLoopFs, make_quiesce: MakeQuiesce) -> None:
    filesystem = make_loop_fs()
    first = make_quiesce(filesystem)
    await first.begin("a", 30_000)
    ended = await first.end("a")
    second = make_quiesce(filesystem)
    assert await second.end("a") == ended
    with pytest.raises(LeaseExpired):
        await second.renew("a", 30_000)
    with pytest.raises(NoSuchId):
        await second.renew("b", 30_000)


async def test_a_guard_that_was_busy_serves_the_next_agent(
    make_loop_fs: MakeLoopFs, make_quiesce: MakeQuiesce, guard: GuardProcess
) -> None:
    filesystem, theirs = make_loop_fs(), make_loop_fs()
    other = Agent(guard)
    other.wait_for("hello")
    other.freeze(theirs)
    quiesce = make_quiesce(filesystem)
    with pytest.raises(Busy, match="guard"):
        await quiesce.begin("a", 30_000)
    protocol.send(other.socket, {"op": "thaw"})
    other.wait_for("idle")
    other.socket.close()
    await quiesce.begin("b", 30_000)
    assert (await quiesce.end("b")).held
    assert not is_frozen(theirs)
