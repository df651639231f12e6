"""The agent on a guest's own system bus, seen by busctl: state for everybody, freezing for root, and no bus at all."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from ballast.host.agent import Agent
from ballast.wire.errors import AgentError
from ballast.wire.names import QuiesceEnded
from tests.lab.guest import Guest
from tests.vm.unit import AGENT, configured, show, usage

NAME = INTERFACE = "org.ballast.Agent1"
PATH = "/org/ballast/Agent1"
DISK = "/mnt/data0"
HEARD = "/run/heard.json"
AS_NOBODY = ["setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups", "--"]
LEASE_MS = 60_000
RESCUE = f"setsid sh -c 'sleep 60; fsfreeze -u {DISK}' </dev/null >/dev/null 2>&1 & echo $!"

PAGE = Path(__file__).parents[2] / "docs/dbus.md"
SHOP, SHOP_SAID, SHOP_UNIT = "/run/shop.py", "/run/shop.said", "shop.service"
RUN_SHOP = f"systemd-run --quiet --collect --unit={SHOP_UNIT} --property=StandardOutput=append:{SHOP_SAID}"
ORDERS_STOP, ORDERS_GO_ON = ["checkpoint", "hold orders back"], ["take orders", "the snapshot is good"]

# Stalls without a shortage: more than a unit of its own may have without being held back.
PRESS = "systemd-run --unit=press --property=MemoryHigh=8M --quiet -- python3 -c 'x = bytearray(64 << 20)'"


def call(guest: Guest, *arguments: str, nobody: bool = False) -> Any:
    """What busctl's call or get-property returns, or the end of what it says of an error."""
    said = guest.run(
        [*(AS_NOBODY if nobody else []), "busctl", "--json=short", "--timeout=40", *arguments], check=False
    )
    if said.returncode:
        return said.stderr.strip()
    data = json.loads(said.stdout)["data"]
    return data[0] if isinstance(data, list) else data


def get(guest: Guest, name: str, *, nobody: bool = False) -> Any:
    return call(guest, "get-property", NAME, PATH, INTERFACE, name, nobody=nobody)


def method(guest: Guest, name: str, *arguments: str, nobody: bool = False) -> Any:
    return call(guest, "call", NAME, PATH, INTERFACE, name, *arguments, nobody=nobody)


def wait_name(guest: Guest) -> None:
    """Wait until the agent is on the bus."""
    guest.run(f"until busctl status {NAME} >/dev/null 2>&1; do sleep 0.1; done", timeout_s=90)


@contextmanager
def listening(guest: Guest) -> Iterator[Callable[[str, str], list[Any]]]:
    """Wait until PropertiesChanged brings a value, given as a pattern; returns all that it has brought so far."""
    monitor = f"busctl --json=short monitor --match=path={PATH}"
    pid = guest.run(f"setsid {monitor} >{HEARD} 2>/dev/null </dev/null & echo $!").stdout.strip()
    guest.run(f"until [ -s {HEARD} ]; do busctl call {NAME} {PATH} org.freedesktop.DBus.Peer Ping; done")

    def wait(name: str, value: str) -> list[Any]:
        pattern = f'"{name}":{{"type":"s","data":"{value}"}}'
        guest.run(f"until grep -q '{pattern}' {HEARD}; do sleep 0.1; done", timeout_s=90)
        messages = [json.loads(line) for line in guest.get(HEARD).decode().splitlines()]
        changes = [one["payload"]["data"][1] for one in messages if one.get("member") == "PropertiesChanged"]
        return [changed[name]["data"] for changed in changes if name in changed]

    try:
        yield wait
    finally:
        guest.run(f"kill {pid}; rm {HEARD}")


def test_every_user_sees_state_and_only_root_freezes(guest: Guest) -> None:
    wait_name(guest)
    values = {name: get(guest, name, nobody=True) for name in ("FreezeState", "PressureLevel", "BalloonBytes")}
    assert values.pop("PressureLevel") in ("low", "medium", "critical")
    assert values == {"FreezeState": "thawed", "BalloonBytes": 0}
    assert get(guest, "Version") == guest.run(["ballastd", "--version"]).stdout.split()[1]
    introspected = guest.run([*AS_NOBODY, "busctl", "introspect", NAME, PATH]).stdout
    assert {".Freeze", ".Thaw", *(f".{name}" for name in values)} <= set(introspected.split())
    assert method(guest, "Freeze", "tas", str(LEASE_MS), "1", DISK, nobody=True) == "Call failed: Access denied"
    assert method(guest, "Thaw", "s", "x", nobody=True) == "Call failed: Access denied"
    guest.run(f"touch {DISK}/written", timeout_s=5)


def test_pressure_and_a_freeze_are_signalled_and_audited(guest: Guest, measured: Callable[[str], None]) -> None:
    wait_name(guest)
    with listening(guest) as wait:
        guest.run(PRESS)
        try:
            wait("PressureLevel", "[mc].*")
        finally:
            guest.run("systemctl kill --signal=KILL press; systemctl reset-failed press", check=False)
        rescue = guest.run(RESCUE).stdout.strip()
        session_id = method(guest, "Freeze", "tas", str(LEASE_MS), "1", DISK)
        refused = guest.run(["fsfreeze", "-f", DISK], check=False)  # EBUSY proves a freeze
        assert "Device or resource busy" in refused.stderr
        assert get(guest, "FreezeState", nobody=True) == "frozen"
        assert method(guest, "Thaw", "s", session_id) is True
        guest.run(f"touch {DISK}/written; pkill -s {rescue}", timeout_s=5)
        assert wait("FreezeState", "thawed") == ["freezing", "frozen", "thawed"]
        levels = wait("PressureLevel", "low")
    assert levels[-1] == "low"
    measured(f"PressureLevel of a unit over its MemoryHigh: {' '.join(levels)}")
    journal = guest.run(["journalctl", f"--unit={AGENT}", "--lines=20", "--output=cat"]).stdout
    audited = [line for line in journal.splitlines() if line.startswith("dbus:")]
    assert [line.split(" ran ")[1].split(",")[0] for line in audited[-2:]] == [
        "ballast-quiesce-begin: done",
        "ballast-quiesce-end: done",
    ]


async def test_the_agent_does_without_a_bus_and_finds_it_when_it_comes(guest: Guest, vsock: str, token: str) -> None:
    wait_name(guest)
    pid = usage(guest).pid
    guest.run("systemctl stop dbus.socket dbus.service")
    async with Agent.connect(vsock, token) as agent:
        assert (await agent.status()).protocol == 1
    guest.run("systemctl start dbus.socket")
    wait_name(guest)
    assert usage(guest).pid == pid
    guest.run("systemctl stop dbus.socket dbus.service")
    guest.run(["systemctl", "restart", AGENT])
    assert show(guest, "ActiveState") == "active"
    async with Agent.connect(vsock, token) as agent:
        assert (await agent.status()).protocol == 1
    guest.run("systemctl start dbus.socket")
    wait_name(guest)


def test_the_configuration_keeps_the_agent_off_the_bus(guest: Guest) -> None:
    with configured(guest, "[dbus]\nenabled = false\n"):
        assert "not provided by any .service files" in method(guest, "Freeze", "tas", str(LEASE_MS), "1", DISK)
    wait_name(guest)


# The service of docs/dbus.md takes part in freezes.


class Shop:
    """What it has printed since it was last asked."""

    def __init__(self, guest: Guest) -> None:
        self._guest = guest
        self._lines = 0

    def said(self) -> list[str]:
        lines = self._guest.get(SHOP_SAID).decode().splitlines()
        self._lines, seen = len(lines), self._lines
        return lines[seen:]

    def wait(self, *lines: str) -> list[str]:
        """Wait until it has said all of these; what else it has said comes with them."""
        for line in lines:
            new = f"tail -n +{self._lines + 1} {SHOP_SAID}"
            self._guest.run(f"until {new} | grep -qxF '{line}'; do sleep 0.1; done", timeout_s=90)
        return self.said()


@pytest.fixture
def shop(guest: Guest) -> Iterator[Shop]:
    guest.put(SHOP, PAGE.read_text().partition("```python\n")[2].partition("```")[0].encode())
    wait_name(guest)
    guest.run(f": >{SHOP_SAID}; {RUN_SHOP} -- python3 -IB {SHOP}")
    shop = Shop(guest)
    shop.wait("registered")
    yield shop
    guest.run(f"systemctl stop {SHOP_UNIT} || true; rm {SHOP} {SHOP_SAID}")


async def begin(vsock: str, token: str) -> str:
    """Freeze all there is, with the shop; the session's id."""
    session_id = str(uuid.uuid4())
    async with Agent.connect(vsock, token) as agent:
        begun = await agent.quiesce_begin(session_id, LEASE_MS)
    assert ("shop", "frozen") in [(writer.name, writer.state) for writer in begun.writers]
    return session_id


async def end(vsock: str, token: str, session_id: str) -> QuiesceEnded:
    """Thaw; an agent that is just starting is asked again."""
    deadline_s = time.monotonic() + 90
    while True:
        try:
            async with Agent.connect(vsock, token) as agent:
                return await agent.quiesce_end(session_id)
        except (AgentError, OSError):
            assert time.monotonic() < deadline_s
            time.sleep(0.2)


async def test_a_service_is_asked_in_order_and_lost_if_it_dies_frozen(
    guest: Guest, vsock: str, token: str, shop: Shop
) -> None:
    ended = await end(vsock, token, await begin(vsock, token))
    assert (ended.held, [one.state for one in ended.writers if one.name == "shop"]) == (True, ["thawed"])
    assert shop.wait(ORDERS_GO_ON[-1]) == ORDERS_STOP + ORDERS_GO_ON
    session_id = await begin(vsock, token)
    guest.run(f"systemctl kill --signal=KILL {SHOP_UNIT}")
    ended = await end(vsock, token, session_id)
    assert (ended.held, ended.reason) == (False, "writer-lost")
    assert shop.said() == ORDERS_STOP


async def test_a_service_hears_once_from_the_next_agent_that_it_is_over(
    guest: Guest, vsock: str, token: str, shop: Shop
) -> None:
    session_id = await begin(vsock, token)
    assert shop.said() == ORDERS_STOP
    guest.run(["systemctl", "kill", "--signal=KILL", AGENT])
    ended = await end(vsock, token, session_id)
    assert (ended.held, ended.reason) == (False, "agent-restarted")
    assert ("shop", "lost") in [(one.name, one.state) for one in ended.writers]
    told = ["registered", "take orders: the agent was restarted"]
    assert sorted(shop.wait(*told)) == told
    assert (await end(vsock, token, await begin(vsock, token))).held
    assert shop.wait(ORDERS_GO_ON[-1]) == ORDERS_STOP + ORDERS_GO_ON
