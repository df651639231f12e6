"""What the agent shows on the system bus: ``org.ballast.Agent1`` at ``/org/ballast/Agent1``; see docs/dbus.md.

Properties for everybody. Methods for root: the bus has a policy (org.ballast.Agent1.conf), and the caller's user is
checked here as well. Freeze and Thaw are the wire's commands: the same sessions, rules, errors, lines in the journal.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from ballast.guest.bus import Bus, BusError, Call, Variant
from ballast.guest.events import Events, Subscription
from ballast.guest.quiesce.services import Services
from ballast.guest.service.introspection import introspect
from ballast.wire.errors import AgentError
from ballast.wire.memory_names import Level
from ballast.wire.message import Event, Failure, Reply

log = logging.getLogger(__name__)

NAME = INTERFACE = "org.ballast.Agent1"
PATH = "/org/ballast/Agent1"
ERROR_PREFIX = "org.ballast.Error."
_DBUS = "org.freedesktop.DBus."
_PROPERTIES, _INTROSPECTABLE, _PEER = _DBUS + "Properties", _DBUS + "Introspectable", _DBUS + "Peer"
_CALLS_MAX = 16  # at work at a time
# That all is frozen the bus hears a moment later: it would take the CPU from whoever is to make the snapshot.
_FROZEN_REST_S = 0.1
_METHODS = {"Freeze": "tas", "Thaw": "s", "RegisterWriter": "soa{sv}", "UnregisterWriter": "s"}
_TYPES = {"PressureLevel": "s", "BalloonBytes": "t", "FreezeState": "s", "Version": "s"}


@dataclass(frozen=True, slots=True)
class _Caller:
    """Who calls, as the dispatcher wants to know it. Only root gets that far."""

    origin: str
    authenticated: bool = True


Answer = Callable[[Any, _Caller], Awaitable[Reply | Failure]]


class Dbus:
    """``run`` keeps it on the bus. ``answer`` runs one of the wire's commands (``Table.answer``)."""

    def __init__(
        self,
        bus: Bus,
        events: Events,
        answer: Answer,
        services: Services,
        *,
        version: str,
        balloon_bytes: Callable[[], int],
    ) -> None:
        self._bus = bus
        self._answer = answer
        self._services = services
        self._do: dict[str, Callable[..., Awaitable[None]]] = {
            "Freeze": self._freeze,
            "Thaw": self._thaw,
            "RegisterWriter": self._register,
            "UnregisterWriter": self._unregister,
        }
        self._balloon_bytes = balloon_bytes
        self._told: dict[str, Any] = {"PressureLevel": "low", "FreezeState": "thawed", "Version": version}
        self._to_emit: deque[tuple[str, Any]] = deque()
        self._at_work: set[asyncio.Task[None]] = set()
        events.subscribe(Subscription(frozenset({"BALLAST_QUIESCE", "BALLAST_BALLOON"}), self._hear))

    async def run(self) -> None:
        """Serve whenever there is a bus, until cancelled. A call that has begun outlives the connection it came by."""
        async with asyncio.TaskGroup() as group:

            def handle(call: Call) -> None:
                method = _METHODS.get(str(call.member))
                if (call.path, call.interface, call.signature) == (PATH, INTERFACE, method):
                    self._admit(call, group)
                else:
                    self._describe(call)

            await self._bus.run(handle)

    def set_level(self, level: Level) -> None:
        """Tell of another pressure level."""
        self._tell("PressureLevel", level)

    def _hear(self, event: Event) -> bool:
        if event.name == "BALLAST_QUIESCE":
            self._tell("FreezeState", event.data["state"])
        else:
            self._tell("BalloonBytes", event.data["total-bytes"])
        return True

    def _tell(self, name: str, value: Any) -> None:
        if self._told.get(name) == value:
            return
        self._told[name] = value
        self._to_emit.append((name, value))
        if value == "frozen":
            asyncio.get_running_loop().call_later(_FROZEN_REST_S, self._emit)
        else:
            self._emit()

    def _emit(self) -> None:
        while self._to_emit:
            name, value = self._to_emit.popleft()
            changed = {name: Variant(_TYPES[name], value)}
            self._bus.emit(PATH, _PROPERTIES, "PropertiesChanged", "sa{sv}as", INTERFACE, changed, [])

    # What everybody may ask: answered at once.

    def _describe(self, call: Call) -> None:
        asked = (call.interface, call.member, call.signature)
        if (xml := introspect(call.path)) is None:
            call.refuse(_DBUS + "Error.UnknownObject", f"there is no object {call.path}")
        elif asked == (_INTROSPECTABLE, "Introspect", ""):
            call.answer("s", xml)
        elif asked == (_PEER, "Ping", ""):
            call.answer()
        elif call.interface == _PROPERTIES and call.path == PATH:
            self._read(call)
        else:
            call.refuse(_DBUS + "Error.UnknownMethod", f"there is no {call.interface}.{call.member}({call.signature})")

    def _read(self, call: Call) -> None:
        asked = (call.member, call.signature)
        if asked == ("Set", "ssv"):
            call.refuse(_DBUS + "Error.PropertyReadOnly", "no property can be set")
            return
        if asked not in (("Get", "ss"), ("GetAll", "s")):
            call.refuse(_DBUS + "Error.UnknownMethod", f"there is no {_PROPERTIES}.{call.member}({call.signature})")
            return
        try:
            interface, *names = call.arguments()
        except ValueError as error:
            call.refuse(_DBUS + "Error.InvalidArgs", str(error))
            return
        values = self._values() if interface in ("", INTERFACE) else {}
        if not names:
            call.answer("a{sv}", values)
        elif names[0] in values:
            call.answer("v", values[names[0]])
        else:
            call.refuse(_DBUS + "Error.UnknownProperty", f"there is no property {interface}.{names[0]}")

    def _values(self) -> dict[str, Variant]:
        values = self._told | {"BalloonBytes": self._balloon_bytes()}
        return {name: Variant(type_, values[name]) for name, type_ in _TYPES.items()}

    # What root may do.

    def _admit(self, call: Call, group: asyncio.TaskGroup) -> None:
        if len(self._at_work) >= _CALLS_MAX:
            call.refuse(_DBUS + "Error.LimitsExceeded", f"{_CALLS_MAX} calls are at work")
            return
        task = group.create_task(self._work(call))
        self._at_work.add(task)
        task.add_done_callback(self._at_work.discard)

    async def _work(self, call: Call) -> None:
        """Check who calls, and do it. Never raises."""
        try:
            uid = await call.uid()
            if uid != 0:
                log.warning("dbus%s, user %d, may not call %s", call.sender, uid, call.member)
                call.refuse(_DBUS + "Error.AccessDenied", f"{call.member} is for root")
                return
            arguments = call.arguments()
            await self._do[str(call.member)](call, _Caller(f"dbus{call.sender}"), *arguments)
        except (BusError, OSError) as error:
            call.refuse(_DBUS + "Error.AccessDenied", f"the bus does not tell who calls: {error}")
        except AgentError as error:
            _fail(call, Failure(error))
        except ValueError as error:
            call.refuse(_DBUS + "Error.InvalidArgs", str(error))
        except Exception:  # a bug: it must not end what else the agent does
            log.exception("%s failed", call.member)
            call.refuse(ERROR_PREFIX + "Failed", "internal error, see the guest's journal")

    async def _freeze(self, call: Call, caller: _Caller, lease_ms: int, mountpoints: list[str]) -> None:
        """Freeze, or tell why not; nobody else knows the id, so a freeze that cannot be told is ended at once."""
        session_id = str(uuid.uuid4())
        arguments = {"id": session_id, "lease-ms": lease_ms} | ({"mountpoints": mountpoints} if mountpoints else {})
        begun = await self._answer({"execute": "ballast-quiesce-begin", "arguments": arguments}, caller)
        if isinstance(begun, Failure):
            _fail(call, begun)
            return
        is_frozen = begun.value["consistency"] != "none"
        if not is_frozen:
            call.refuse(ERROR_PREFIX + "NotSupported", "none of these file systems can be frozen")
        if not is_frozen or not call.answer("s", session_id):
            await self._answer({"execute": "ballast-quiesce-end", "arguments": {"id": session_id}}, caller)

    async def _thaw(self, call: Call, caller: _Caller, session_id: str) -> None:
        ended = await self._answer({"execute": "ballast-quiesce-end", "arguments": {"id": session_id}}, caller)
        if isinstance(ended, Failure):
            _fail(call, ended)
        else:
            call.answer("b", ended.value["held"])

    async def _register(self, call: Call, _: _Caller, name: str, path: str, description: dict[str, Variant]) -> None:
        plain = {key: variant.value for key, variant in description.items()}
        await self._services.register(name, call.sender, path, plain)
        call.answer()

    async def _unregister(self, call: Call, _: _Caller, name: str) -> None:
        self._services.unregister(name, call.sender)
        call.answer()


def _fail(call: Call, failure: Failure) -> None:
    """The wire's reason as a name: ``bad-argument`` is ``org.ballast.Error.BadArgument``."""
    name = "".join(word.capitalize() for word in (failure.error.reason or "failed").split("-"))
    call.refuse(ERROR_PREFIX + name, failure.error.desc)
