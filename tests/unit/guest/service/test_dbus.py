"""What the agent shows on a bus, to the stock clients. Freeze and Thaw are tried in tests/kernel, on real disks."""

from __future__ import annotations

import asyncio
import contextlib
import os
import tempfile
import xml.etree.ElementTree as ET
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from ballast.guest.bus import Bus, BusError, Variant
from ballast.guest.events import Events
from ballast.guest.quiesce.services import Services
from ballast.guest.service.dbus import INTERFACE, NAME, PATH, Dbus
from ballast.wire.errors import AgentError, BadRequest, Busy, Refused
from ballast.wire.message import Failure, Reply
from tests.unit.guest.bus_peer import Peer
from tests.unit.guest.private_bus import DEADLINE_S, POLICY, PROPERTIES, PrivateBus

BALLOON_BYTES = 5 << 40  # more than a u
NOBODY = 65534
BEGUN = {"consistency": "filesystem"}


class Shown:
    """The object on its bus, and a dispatcher that answers what the test wants."""

    def __init__(self, bus: PrivateBus) -> None:
        self.bus = bus
        self.events = Events()
        self.asked: list[tuple[Any, str]] = []
        self.answers: list[Reply | Failure] = []
        self.may_answer = asyncio.Event()
        self.may_answer.set()
        agents = Bus(NAME, is_frozen=lambda: False, path=str(bus.path))
        self.services = Services(agents, is_frozen=lambda: False, markers=bus.path.parent / "markers")
        self.dbus = Dbus(
            *(agents, self.events, self._answer, self.services), version="1.2.3", balloon_bytes=lambda: BALLOON_BYTES
        )

    async def _answer(self, request: Any, caller: Any) -> Reply | Failure:
        self.asked.append((request, caller.origin))
        await self.may_answer.wait()
        return self.answers.pop(0)


@contextlib.asynccontextmanager
async def show(bus: PrivateBus) -> AsyncIterator[Shown]:
    """The object on that bus, and the bus's end at the end."""
    shown = Shown(bus)
    task = asyncio.create_task(shown.dbus.run())
    try:
        await bus.wait_name()
        yield shown
    finally:
        assert not task.done()
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        bus.stop()


@pytest.fixture
async def shown(tmp_path: Path) -> AsyncIterator[Shown]:
    async with show(PrivateBus(tmp_path)) as shown:
        yield shown


async def test_properties_are_told(shown: Shown) -> None:
    everything = {"BalloonBytes": BALLOON_BYTES, "FreezeState": "thawed", "PressureLevel": "low", "Version": "1.2.3"}
    assert {name: await shown.bus.get(name) for name in everything} == everything
    told = (await shown.bus.busctl("call", NAME, PATH, PROPERTIES, "GetAll", "s", INTERFACE)).data()
    assert {name: value["data"] for name, value in told.items()} == everything
    assert {name: value["type"] for name, value in told.items()} == {
        "BalloonBytes": "t",
        "FreezeState": "s",
        "PressureLevel": "s",
        "Version": "s",
    }


async def test_each_change_is_signalled_once(shown: Shown) -> None:
    async with shown.bus.listen() as changes, asyncio.timeout(DEADLINE_S):
        for level in ("low", "critical", "critical", "medium"):
            shown.dbus.set_level(level)
        for state in ("freezing", "frozen", "thawed"):
            shown.events.publish("BALLAST_QUIESCE", {"id": "x", "state": state})
        shown.events.publish("BALLAST_BALLOON", {"cause": "inflate", "total-bytes": 1 << 33})
        heard = [await changes.get() for _ in range(6)]
        assert heard == [
            {"PressureLevel": "critical"},
            {"PressureLevel": "medium"},
            {"FreezeState": "freezing"},
            {"FreezeState": "frozen"},
            {"FreezeState": "thawed"},
            {"BalloonBytes": 1 << 33},
        ]
        assert (await shown.bus.get("PressureLevel"), await shown.bus.get("FreezeState")) == ("medium", "thawed")


async def test_introspection_leads_to_the_object_and_names_the_wires_members(shown: Shown) -> None:
    tree = (await shown.bus.busctl("tree", "--list", NAME)).out.split()
    assert tree[-1] == PATH
    node = ET.fromstring((await shown.bus.busctl("introspect", "--xml-interface", NAME, PATH)).out)
    (ours,) = [interface for interface in node if interface.get("name") == INTERFACE]
    members = {
        (one.tag, one.get("name")): one.get("type") or [(arg.get("name"), arg.get("type")) for arg in one]
        for one in ours
    }
    assert members == {
        ("property", "PressureLevel"): "s",
        ("property", "BalloonBytes"): "t",
        ("property", "FreezeState"): "s",
        ("property", "Version"): "s",
        ("method", "Freeze"): [("lease_ms", "t"), ("mountpoints", "as"), ("id", "s")],
        ("method", "Thaw"): [("id", "s"), ("held", "b")],
        ("method", "RegisterWriter"): [("name", "s"), ("path", "o"), ("description", "a{sv}")],
        ("method", "UnregisterWriter"): [("name", "s")],
    }


@pytest.mark.parametrize(
    ("path", "method", "arguments", "error"),
    [
        ("/org/ballast/Agent2", f"{INTERFACE}.Thaw", ["string:x"], "UnknownObject"),
        ("/", f"{INTERFACE}.Thaw", ["string:x"], "UnknownMethod"),
        (PATH, f"{INTERFACE}.Thaw", [], "UnknownMethod"),
        (PATH, f"{INTERFACE}.Thaw", ["int32:1"], "UnknownMethod"),
        (PATH, f"{INTERFACE}.Freeze", ["uint32:1000", "array:string:/"], "UnknownMethod"),
        (PATH, f"{INTERFACE}.Melt", [], "UnknownMethod"),
        (PATH, f"{INTERFACE}.RegisterWriter", ["string:x", "string:/x"], "UnknownMethod"),
        (PATH, "org.ballast.Agent2.Thaw", ["string:x"], "UnknownMethod"),
        (PATH, f"{PROPERTIES}.Get", [f"string:{INTERFACE}", "string:Colour"], "UnknownProperty"),
        (PATH, f"{PROPERTIES}.Get", ["string:org.example", "string:Version"], "UnknownProperty"),
        (PATH, f"{PROPERTIES}.Get", [f"string:{INTERFACE}"], "UnknownMethod"),
        (PATH, f"{PROPERTIES}.Get", [f"string:{INTERFACE}", f"string:{'x' * 70_000}"], "InvalidArgs"),
        (PATH, f"{PROPERTIES}.Set", [f"string:{INTERFACE}", "string:Version", "variant:string:2"], "PropertyReadOnly"),
        (PATH, "org.freedesktop.DBus.Peer.GetMachineId", [], "UnknownMethod"),
    ],
)
async def test_what_is_not_there_is_refused_by_its_name(
    shown: Shown, path: str, method: str, arguments: list[str], error: str
) -> None:
    said = await shown.bus.send(path, method, *arguments)
    assert said.err.startswith(f"Error org.freedesktop.DBus.Error.{error}: ")
    assert shown.asked == []


async def test_it_can_be_pinged(shown: Shown) -> None:
    assert not (await shown.bus.send(PATH, "org.freedesktop.DBus.Peer.Ping")).err


# Freeze and Thaw, as far as the bus goes


async def freeze(shown: Shown, *answers: Reply | Failure, mountpoints: str = "/mnt") -> str:
    """What dbus-send prints for Freeze when the dispatcher gives those answers."""
    shown.answers[:] = answers
    said = await shown.bus.send(PATH, f"{INTERFACE}.Freeze", "uint64:5000", f"array:string:{mountpoints}")
    return said.err or said.out


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that other users reach."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.fixture
def _as_root() -> None:
    if os.geteuid():
        pytest.skip("needs root")


@pytest.mark.usefixtures("_as_root")
async def test_freeze_and_thaw_are_the_wires_commands(shown: Shown) -> None:
    said = await freeze(shown, Reply(BEGUN))
    ((request, origin),) = shown.asked
    session_id = request["arguments"]["id"]
    assert request == {
        "execute": "ballast-quiesce-begin",
        "arguments": {"id": session_id, "lease-ms": 5000, "mountpoints": ["/mnt"]},
    }
    assert origin.startswith("dbus:1.")
    assert said.split()[-1] == f'"{session_id}"'
    for held in (True, False):
        shown.answers = [Reply({"held": held})]
        assert (await shown.bus.call("Thaw", "s", session_id)).data() is held
        assert shown.asked[-1][0] == {"execute": "ballast-quiesce-end", "arguments": {"id": session_id}}


@pytest.mark.usefixtures("_as_root")
async def test_no_mount_point_named_means_all(shown: Shown) -> None:
    await freeze(shown, Reply(BEGUN), mountpoints="")
    assert "mountpoints" not in shown.asked[0][0]["arguments"]


@pytest.mark.usefixtures("_as_root")
@pytest.mark.parametrize(
    ("error", "name"),
    [
        (BadRequest("lease-ms \0 \udcff"), "BadArgument"),
        (Busy("held by x", id="x"), "Busy"),
        (Refused("disabled"), "RefusedByPolicy"),
        (AgentError("a bug"), "Failed"),
    ],
)
async def test_the_wires_errors_have_names(shown: Shown, error: AgentError, name: str) -> None:
    said = await freeze(shown, Failure(error))
    assert said.startswith(f"Error org.ballast.Error.{name}: {error.desc[:8]}")


@pytest.mark.usefixtures("_as_root")
async def test_a_freeze_of_nothing_is_ended_and_an_error(shown: Shown) -> None:
    said = await freeze(shown, Reply({"consistency": "none"}), Reply({"held": True}))
    assert said.startswith("Error org.ballast.Error.NotSupported: ")
    async with asyncio.timeout(DEADLINE_S):
        while len(shown.asked) < 2:  # noqa: ASYNC110 - nobody tells of it
            await asyncio.sleep(0)
    assert shown.asked[1][0]["execute"] == "ballast-quiesce-end"


@pytest.mark.usefixtures("_as_root")
async def test_a_freeze_that_cannot_be_told_is_ended_since_nobody_knows_its_id(shown: Shown) -> None:
    shown.answers = [Reply(BEGUN), Reply({"held": True})]
    shown.may_answer.clear()
    calling = asyncio.create_task(shown.bus.call("Freeze", "tas", "5000", "0"))
    async with asyncio.timeout(DEADLINE_S):
        while not shown.asked:  # noqa: ASYNC110 - nobody tells of it
            await asyncio.sleep(0)
        shown.bus.stop()
        await calling
        shown.may_answer.set()
        while len(shown.asked) < 2:  # noqa: ASYNC110
            await asyncio.sleep(0)
    begin, end = (request for request, _ in shown.asked)
    assert (end["execute"], end["arguments"]) == ("ballast-quiesce-end", {"id": begin["arguments"]["id"]})


@pytest.mark.usefixtures("_as_root")
async def test_only_so_many_calls_are_at_work(shown: Shown) -> None:
    shown.may_answer.clear()
    shown.answers = [Failure(Busy("held"))] * 16
    async with asyncio.TaskGroup() as calling:
        waiting = [calling.create_task(shown.bus.send(PATH, f"{INTERFACE}.Thaw", "string:x")) for _ in range(17)]
        async with asyncio.timeout(DEADLINE_S):
            while not any(call.done() for call in waiting):  # noqa: ASYNC110
                await asyncio.sleep(0)
        shown.may_answer.set()
    errors = sorted(call.result().err.split(":")[0] for call in waiting)
    assert errors == ["Error org.ballast.Error.Busy"] * 16 + ["Error org.freedesktop.DBus.Error.LimitsExceeded"]


@pytest.mark.usefixtures("_as_root")
@pytest.mark.parametrize("lax", [False, True])
async def test_only_root_freezes_whatever_the_policy_says(open_folder: Path, *, lax: bool) -> None:
    policy = POLICY.read_text()
    if lax:
        policy = policy.replace("</policy>\n</busconfig>", f'<allow send_destination="{NAME}"/></policy></busconfig>')
    async with show(PrivateBus(open_folder, policy)) as shown:
        said = await shown.bus.call("RegisterWriter", "soa{sv}", "x", "/x", "0", user=NOBODY)
        assert said.err == "Call failed: Access denied"
        refused = (
            ("Freeze", ["uint64:5000", "array:string:"]),
            ("Thaw", ["string:x"]),
            ("UnregisterWriter", ["string:x"]),
        )
        for method, arguments in refused:
            said = await shown.bus.send(PATH, f"{INTERFACE}.{method}", *arguments, user=NOBODY)
            assert said.err.startswith("Error org.freedesktop.DBus.Error.AccessDenied: ")
            assert said.err.endswith(f": {method} is for root") == lax
        assert shown.services.writers() == []
        assert await shown.bus.get("Version", user=NOBODY) == "1.2.3"
        assert PATH in (await shown.bus.busctl("tree", "--list", NAME, user=NOBODY)).out
        assert shown.asked == []


@pytest.mark.usefixtures("_as_root")
async def test_a_service_registers_itself_and_nobody_else(shown: Shown) -> None:
    async with asyncio.timeout(DEADLINE_S), Peer(shown.bus.path) as peer, Peer(shown.bus.path) as other:
        described = {"level": Variant("s", "system"), "critical": Variant("b", True), "thaw-ms": Variant("u", 500)}
        register = ("RegisterWriter", "soa{sv}", "shop", "/shop", described)
        assert await peer.call(INTERFACE, PATH, *register) == []
        (writer,) = shown.services.writers()
        description = await writer.start("x", {}, timeout_s=1)
        assert (writer.name, description.level, description.critical) == ("shop", "system", True)
        assert (description.thaw_ms, description.freeze_ms) == (500, 10_000)
        for call, error in (
            (register, "Busy"),
            (("RegisterWriter", "soa{sv}", "Shop", "/shop", {}), "BadArgument"),
            (("UnregisterWriter", "s", "shop"), "NoSuchId"),
        ):
            with pytest.raises(BusError) as refused:
                await other.call(INTERFACE, PATH, *call)
            assert refused.value.name == f"org.ballast.Error.{error}"
        assert await peer.call(INTERFACE, PATH, "UnregisterWriter", "s", "shop") == []
        assert shown.services.writers() == []
