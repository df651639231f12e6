"""A frozen window: renewed while it lasts, ended whatever happens."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

import pytest

from ballast.host.agent import Agent
from ballast.host.connect import PeerGone
from ballast.host.window import FreezePlan, FrozenWindow
from ballast.wire.errors import AgentError, Busy, NoSuchId
from tests.unit.host.fake import DEADLINE_S, ENDED, FakeAgent, Refusal

END, BEGIN, RENEW = "ballast-quiesce-end", "ballast-quiesce-begin", "ballast-quiesce-renew"


@pytest.fixture(autouse=True)
def _short_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ballast.host.window.LEASE_LEAST_S", 0.1)
    monkeypatch.setattr("ballast.host.window.RETRY_S", 0.01)


class Told(list[str]):
    """What a window told a person."""

    def __init__(self) -> None:
        super().__init__()
        self.changed = asyncio.Event()

    def __call__(self, text: str) -> None:
        self.append(text)
        self.changed.set()

    async def wait_for(self, part: str) -> None:
        """Wait until it told something with ``part``."""
        async with asyncio.timeout(DEADLINE_S):
            while not any(part in text for text in self):
                self.changed.clear()
                await self.changed.wait()


def window_of(fake: FakeAgent, told: Told | None = None, **plan: Any) -> FrozenWindow:
    """Make a window over that agent."""
    return FrozenWindow(
        partial(Agent.connect, fake.target), FreezePlan(**({"lease_s": 30.0} | plan)), Told() if told is None else told
    )


async def test_it_freezes_renews_and_ends(fake: FakeAgent) -> None:
    async with window_of(fake, lease_s=0.9, max_hold_s=60.0) as window:
        begun = await window.begin()
        assert await fake.wait_for(RENEW) == {"id": begun.id, "lease-ms": 900}
        ended = await window.end()
    assert ended.held
    assert [name for name, _ in fake.asked][1:] == [BEGIN, RENEW, END]
    assert {arguments["id"] for _, arguments in fake.asked[1:]} == {window.id}


async def test_leaving_thaws_what_was_not_ended(fake: FakeAgent) -> None:
    async with window_of(fake) as window:
        await window.begin()
    assert fake.count(END) == 1
    assert window.ended is not None


async def test_a_freeze_left_held_is_not_ended(fake: FakeAgent) -> None:
    async with window_of(fake) as window:
        await window.begin()
        await window.leave_held()
    assert fake.count(END) == 0


async def test_a_freeze_that_was_refused_needs_no_end(fake: FakeAgent) -> None:
    fake.answers[BEGIN] = Refusal("busy", "held by another")
    with pytest.raises(Busy, match="held by another"):
        async with window_of(fake) as window:
            await window.begin()
    assert fake.count(END) == 0


async def test_a_cancelled_begin_is_ended_over_a_new_connection(fake: FakeAgent) -> None:
    """The agent answers a connection's requests in order: over the old one, the end would wait for the begin."""
    fake.answers[BEGIN] = lambda _: asyncio.get_running_loop().create_future()

    async def freeze() -> None:
        async with window_of(fake) as window:
            await window.begin()

    freezing = asyncio.create_task(freeze())
    await fake.wait_for(BEGIN)
    freezing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await freezing
    assert fake.count(END) == 1
    assert len(fake.writers) == 2


async def test_a_begin_whose_connection_was_lost_is_ended(fake: FakeAgent) -> None:
    def lose(_: dict[str, Any]) -> None:
        fake.drop()

    fake.answers[BEGIN] = lose
    with pytest.raises(PeerGone):
        async with window_of(fake) as window:
            await window.begin()
    assert fake.count(END) == 1


async def test_an_answer_that_cannot_be_read_is_ended_too(fake: FakeAgent) -> None:
    fake.answers[BEGIN] = {"from": "the future"}
    with pytest.raises(AgentError, match="cannot read"):
        async with window_of(fake) as window:
            await window.begin()
    assert fake.count(END) == 1


async def test_a_lost_connection_is_made_anew_to_renew_and_to_end(fake: FakeAgent) -> None:
    told = Told()
    async with window_of(fake, told, lease_s=0.9) as window:
        await window.begin()
        fake.drop()
        await told.wait_for("the lease was not renewed, trying again")
        await fake.wait_for(RENEW)
        fake.drop()
        ended = await window.end()
    assert ended.held
    assert len(fake.writers) >= 3


async def test_an_end_is_tried_until_the_agent_is_back(fake: FakeAgent) -> None:
    def lose_twice(_: dict[str, Any]) -> Any:
        if fake.count(END) < 3:
            fake.drop()
        return ENDED | {"held": False, "reason": "agent-restarted"}

    fake.answers[END] = lose_twice
    async with window_of(fake) as window:
        await window.begin()
        ended = await window.end()
    assert (ended.held, ended.reason) == (False, "agent-restarted")


async def test_an_end_that_reaches_nobody_gives_up(fake: FakeAgent, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ballast.host.window.END_PATIENCE_S", 0.05)
    told = Told()
    fake.answers[END] = lambda _: fake.drop()
    async with window_of(fake, told) as window:
        await window.begin()
        with pytest.raises(PeerGone):
            await window.end()
    assert "trying again to thaw" in told[-1]


async def test_an_end_that_was_cancelled_is_made_again_on_the_way_out(fake: FakeAgent) -> None:
    answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    fake.answers[END] = lambda _: answer if fake.count(END) == 1 else ENDED

    async def freeze() -> None:
        async with window_of(fake) as window:
            await window.begin()
            await window.end()

    freezing = asyncio.create_task(freeze())
    await fake.wait_for(END)
    freezing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await freezing
    assert fake.count(END) == 2


async def test_an_id_that_the_agent_forgot_is_told_once(fake: FakeAgent) -> None:
    fake.answers[END] = Refusal("no-such-id")
    async with window_of(fake) as window:
        await window.begin()
        with pytest.raises(NoSuchId):
            await window.end()
    assert fake.count(END) == 1


async def test_nothing_is_renewed_beyond_the_longest_hold(fake: FakeAgent) -> None:
    told = Told()
    async with window_of(fake, told, lease_s=0.9, max_hold_s=0.65) as window:
        await window.begin()
        await told.wait_for("not renewed any more")
        await window.end()
    leases_ms = [arguments["lease-ms"] for name, arguments in fake.asked if name == RENEW]
    assert len(leases_ms) == 1
    assert 100 <= leases_ms[0] <= 350


async def test_a_lease_that_is_over_is_told(fake: FakeAgent) -> None:
    fake.answers[RENEW] = Refusal("lease-expired", "it ended by itself")
    told = Told()
    async with window_of(fake, told, lease_s=0.9) as window:
        await window.begin()
        await told.wait_for("the lease cannot be renewed: it ended by itself")
        await window.end()
    assert fake.count(RENEW) == 1


async def test_no_lease_is_longer_than_the_longest_hold(fake: FakeAgent) -> None:
    async with window_of(fake, lease_s=30.0, max_hold_s=5.0) as window:
        await window.begin()
    assert (await fake.wait_for(BEGIN))["lease-ms"] == 5000
