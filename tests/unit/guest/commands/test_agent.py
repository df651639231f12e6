"""The handshake, the token and subscriptions, as a peer sees them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from ballast.guest.commands.agent import AgentCommands, Sources
from ballast.guest.dispatch import Table, command
from ballast.guest.events import NAMES, Events, Subscription
from ballast.wire.errors import NotSupported
from ballast.wire.memory_names import PsiTrigger
from ballast.wire.names import AgentStatus, Limits
from tests.unit.guest.served import Client, Served

TOKEN = "0123456789abcdef"
STATUS = AgentStatus("1", 1, [], "b", 4096, Limits(1, 2, 3), 0, 0, 0, True, None, "stopped", "stopped")


class Switches:
    """What a subscription switches on and off again."""

    def __init__(self) -> None:
        self.on: list[str] = []
        self.triggers: list[PsiTrigger] | None = None
        self.works = True

    def watch_pressure(self, triggers: list[PsiTrigger] | None, _: Subscription) -> Callable[[], None]:
        if not self.works:
            raise NotSupported("no psi")
        self.triggers = triggers
        return self._switch("pressure")

    def report_demand(self, interval_s: float, _: Subscription) -> Callable[[], None]:
        return self._switch(f"demand {interval_s}")

    def _switch(self, name: str) -> Callable[[], None]:
        self.on.append(name)
        return lambda: self.on.remove(name)


class Secret:
    """A command for the authenticated."""

    @command("secret")
    async def secret(self) -> int:
        return 5


class Agent(Served):
    """With the agent's own commands."""

    def __init__(self, folder: Path, *, token: str | None = TOKEN, authenticated: bool = False) -> None:
        self.events, self.switches = Events(), Switches()
        sources = Sources(self.switches.watch_pressure, self.switches.report_demand)
        table = Table(is_frozen=lambda: False, block=["guest-sync"])
        secret = token.encode() if token else None
        table.add(AgentCommands(table, self.events, sources, version="9.9", token=secret, read_status=lambda: STATUS))
        table.add(Secret())
        super().__init__(folder, table, authenticated=authenticated)


MakeAgent = Callable[..., Agent]


@pytest_asyncio.fixture
async def make_agent(tmp_path: Path) -> AsyncIterator[MakeAgent]:
    agents: list[Agent] = []

    def make(**options: Any) -> Agent:
        agents.append(Agent(tmp_path, **options))
        return agents[-1]

    yield make
    for agent in agents:
        await agent.close()


async def refusal(client: Client, execute: str, **arguments: Any) -> dict[str, Any]:
    """The error's data, with its text."""
    client.send(execute, **arguments)
    error = (await client.receive())["error"]
    return {"desc": error["desc"], **error["data"]}


# The handshake


async def test_a_stranger_may_shake_hands(make_agent: MakeAgent) -> None:
    client = await make_agent().connect()
    assert await client.ask("guest-ping") == {}
    client.send("guest-sync-delimited", id=7)
    assert await client.reader.readexactly(1) == b"\xff"
    assert await client.receive() == {"return": 7}
    info = await client.ask("guest-info")
    assert info["version"] == "9.9"
    enabled = {entry["name"]: entry["enabled"] for entry in info["supported_commands"]}
    assert enabled["guest-ping"]
    assert enabled["ballast-subscribe"]  # by policy: that this peer must authenticate first is its own affair
    assert not enabled["guest-sync"]
    assert (await client.ask("ballast-agent-status"))["limits"] == {"lease-ms": 1, "chunk-bytes": 2, "line-bytes": 3}


# The token


async def test_the_token_opens_the_rest_for_its_connection_only(make_agent: MakeAgent) -> None:
    agent = make_agent()
    client, other = await agent.connect(), await agent.connect()
    assert (await refusal(client, "secret"))["reason"] == "unauthenticated"
    assert await client.ask("ballast-authenticate", token=TOKEN) == {}
    assert await client.ask("secret") == 5
    assert (await refusal(other, "secret"))["reason"] == "unauthenticated"


@pytest.mark.parametrize("wrong", ["", TOKEN[:-1], TOKEN + "0", TOKEN.upper(), f" {TOKEN}", "é", "\ud800"])
async def test_the_third_wrong_token_is_answered_and_ends_the_connection(make_agent: MakeAgent, wrong: str) -> None:
    client = await make_agent().connect()
    for _ in range(3):
        said = await refusal(client, "ballast-authenticate", token=wrong)
        assert said == {"desc": "the token is wrong", "reason": "unauthenticated"}
    client.send("ballast-authenticate", token=TOKEN)
    await client.wait_gone()


async def test_without_a_credential_no_token_is_right(make_agent: MakeAgent) -> None:
    client = await make_agent(token=None).connect()
    assert (await refusal(client, "ballast-authenticate", token=""))["desc"] == "no token was provisioned"
    assert (await refusal(client, "secret"))["reason"] == "unauthenticated"


# Subscriptions


@pytest.mark.parametrize(
    ("arguments", "argument"),
    [
        ({"events": ["BALLAST_PRESURE"]}, "events"),
        ({"events": ["BALLAST_DEMAND", ""]}, "events"),
        ({"demand": {"interval-ms": 99}}, "demand.interval-ms"),
        ({"demand": {"interval-ms": 3_600_001}}, "demand.interval-ms"),
        ({"demand": {}}, "demand.interval-ms"),
        ({"psi": [{"kind": "most", "stall-us": 1, "window-us": 1}]}, "psi[0].kind"),
    ],
)
async def test_a_wrong_subscription_names_its_argument_and_leaves_the_old_one(
    make_agent: MakeAgent, arguments: dict[str, Any], argument: str
) -> None:
    agent = make_agent(authenticated=True)
    client = await agent.connect()
    await client.ask("ballast-subscribe", events=["BALLAST_QUIESCE"])
    assert (await refusal(client, "ballast-subscribe", **arguments))["argument"] == argument
    agent.events.publish("BALLAST_QUIESCE", {"state": "frozen"})
    assert (await client.receive())["data"] == {"state": "frozen"}


async def test_without_arguments_everything_is_sent(make_agent: MakeAgent) -> None:
    agent = make_agent(authenticated=True)
    client = await agent.connect()
    await client.ask("ballast-subscribe")
    assert agent.switches.on == ["pressure"]
    assert agent.switches.triggers is None
    for number, name in enumerate(NAMES, 1):
        agent.events.publish(name, {})
        event = await client.receive()
        assert (event["event"], event["seq"]) == (name, number)


@pytest.mark.parametrize(
    ("arguments", "on"),
    [
        ({"events": []}, []),
        ({"events": ["BALLAST_QUIESCE"]}, []),
        ({"events": ["BALLAST_PRESSURE"]}, ["pressure"]),
        ({"events": [], "psi": [{"kind": "some", "stall-us": 1, "window-us": 2}]}, ["pressure"]),
        ({"events": [], "demand": {"interval-ms": 1500}}, ["demand 1.5"]),
    ],
)
async def test_only_what_was_asked_for_is_switched_on(
    make_agent: MakeAgent, arguments: dict[str, Any], on: list[str]
) -> None:
    agent = make_agent(authenticated=True)
    client = await agent.connect()
    await client.ask("ballast-subscribe", **arguments)
    assert agent.switches.on == on


async def test_a_new_subscription_replaces_the_old(make_agent: MakeAgent) -> None:
    agent = make_agent(authenticated=True)
    client = await agent.connect()
    await client.ask("ballast-subscribe", demand={"interval-ms": 1000})
    await client.ask("ballast-subscribe", events=["BALLAST_QUIESCE"])
    assert agent.switches.on == []
    agent.events.publish("BALLAST_DEMAND", {})
    agent.events.publish("BALLAST_QUIESCE", {})
    event = await client.receive()
    assert (event["event"], event["seq"]) == ("BALLAST_QUIESCE", 1)


async def test_one_that_cannot_be_switched_on_leaves_nothing_on(make_agent: MakeAgent) -> None:
    agent = make_agent(authenticated=True)
    client = await agent.connect()
    agent.switches.works = False
    assert (await refusal(client, "ballast-subscribe", demand={"interval-ms": 100}))["reason"] == "not-supported"
    assert agent.switches.on == []


async def test_it_ends_with_the_connection(make_agent: MakeAgent) -> None:
    agent = make_agent(authenticated=True)
    client = await agent.connect()
    await client.ask("ballast-subscribe", demand={"interval-ms": 100})
    client.writer.close()
    await agent.wait_peers(0)
    assert agent.switches.on == []
    agent.events.publish("BALLAST_QUIESCE", {})  # to nobody
    await asyncio.sleep(0)
