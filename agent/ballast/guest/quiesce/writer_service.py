"""A writer that is a service on the system bus: ``org.ballast.Writer1`` on the unique name that registered it.

docs/dbus.md is the page for who writes one. Each call has a deadline, none is made while a file system is frozen.

``Thaw`` or ``Abort`` is sent at most once, for what may be a long undoing must not come twice: the marker in /run,
which stands there from before ``Prepare``, is taken away before the call, not after its answer.
"""

from __future__ import annotations

import contextlib
import json
import math
from asyncio import Future
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ballast.guest.bus import Bus, BusError, Variant, printable
from ballast.guest.quiesce.markers import left_in
from ballast.guest.quiesce.writer import (
    Description,
    Verb,
    WriterEnded,
    WriterFailed,
    WriterTimedOut,
    read_description,
)

INTERFACE = "org.ballast.Writer1"
RETRYABLE = "org.ballast.Error.Retryable"

_REASON_MAX = 1000
_BUS_ERROR = "org.freedesktop.DBus.Error."
_GONE = {_BUS_ERROR + name for name in ("ServiceUnknown", "NameHasNoOwner", "NoReply")}
_RETURNS = {"freeze": "a{sv}", "thaw": "bs"}


@dataclass(frozen=True, slots=True)
class Prepared:
    """A service that was sent ``Prepare`` for a session, and neither ``Thaw`` nor ``Abort``."""

    name: str
    owner: str
    path: str
    bus_id: str
    session_id: str


@dataclass(frozen=True, slots=True)
class Service:
    """One that has registered. ``gone`` is done when ``owner`` leaves the bus, and cancelled when the agent does."""

    name: str
    owner: str
    path: str
    description: dict[str, Any]
    gone: Future[None]


class WriterService:
    """A ``Writer``, by its registration."""

    def __init__(self, service: Service, bus: Bus, markers: Path) -> None:
        self.name = service.name
        self._service = service
        self._bus = bus
        self._marker = markers / service.name
        self._prepared = Prepared(service.name, service.owner, service.path, bus.id, "")
        self._has_ended = False

    async def start(self, session_id: str, config: dict[str, Any], *, timeout_s: float) -> Description:
        """See ``Writer``. It said who it is when it registered."""
        self._prepared = replace(self._prepared, session_id=session_id)
        return read_description(self._service.description, config)

    async def ask(self, verb: Verb, *, timeout_s: float, **arguments: Any) -> dict[str, Any]:
        """See ``Writer``."""
        self._expect_there()
        if verb == "prepare":
            self._write_marker()
        elif verb in ("thaw", "abort"):
            _forget(self._marker)
        try:
            returned = await _call(self._bus, self._prepared, verb, arguments, timeout_s)
        except WriterEnded:
            self._has_ended = True
            raise
        if verb == "freeze":
            return {"detail": _plain(returned[0])} if returned[0] else {}
        if verb == "thaw":
            return {"held": returned[0]} | ({"reason": returned[1]} if returned[1] else {})
        return {}

    def lifeline(self) -> None:
        """See ``Writer``. The next agent tells it."""

    async def force_abort(self, *, timeout_s: float) -> None:
        """See ``Writer``. Nobody can end a service: it is told, if it was not told yet."""
        if self._has_ended or _has_left(self._service):
            _forget(self._marker)
            return
        if not self._marker.exists():
            raise WriterFailed("it was told, and does not answer")
        if not self._bus.id:
            raise WriterFailed("the bus is gone; it is told when that is back")
        _forget(self._marker)
        await abort(self._bus, self._prepared, "it did not answer in time", timeout_s=timeout_s)

    def close(self) -> None:
        """See ``Writer``."""

    def _expect_there(self) -> None:
        if self._service.gone.cancelled():
            raise WriterEnded("the bus was lost, and with it what becomes of the service")
        if self._service.gone.done():
            raise WriterEnded("it has left the bus")

    def _write_marker(self) -> None:
        try:
            self._marker.parent.mkdir(exist_ok=True)
            self._marker.write_text(json.dumps(asdict(self._prepared)))
        except OSError as error:
            raise WriterFailed(f"cannot write {self._marker}: {error.strerror}") from error


def take_prepared(markers: Path) -> list[Prepared]:
    """Those that were prepared and not told that it is over. From now on nobody knows of them but the caller."""
    found = []
    for marker in left_in(markers):
        with contextlib.suppress(OSError, ValueError, TypeError):  # half written: nothing was sent
            found.append(Prepared(**json.loads(marker.read_text())))
        _forget(marker)
    return found


def _forget(marker: Path) -> None:
    with contextlib.suppress(OSError):
        marker.unlink()


async def abort(bus: Bus, prepared: Prepared, reason: str, *, timeout_s: float) -> None:
    """Tell one of ``take_prepared``, or a service that has left, which needs nothing. WriterFailed."""
    if prepared.bus_id != bus.id:  # another bus: its names mean others
        return
    with contextlib.suppress(WriterEnded):
        await _call(bus, prepared, "abort", {"reason": reason}, timeout_s)


async def _call(bus: Bus, whom: Prepared, verb: Verb, arguments: dict[str, Any], timeout_s: float) -> list[Any]:
    """Have a service do something; what it returned. WriterFailed and its kinds."""
    signature, values = _arguments(verb, arguments)
    member, deadline_ms = verb.capitalize(), round(1000 * timeout_s)
    try:
        return await bus.call(
            *(whom.owner, whom.path, INTERFACE, member, "st" + signature),
            *(printable(whom.session_id), deadline_ms, *values),
            returns=_RETURNS.get(verb, ""),
            timeout_s=timeout_s,
        )
    except TimeoutError as error:
        raise WriterTimedOut(f"did not answer {member} within {timeout_s:.1f} s") from error
    except ConnectionError as error:
        raise WriterEnded(str(error)) from error
    except BusError as error:
        if error.name in _GONE:
            raise WriterEnded("it has left the bus") from error
        is_known = error.name.startswith("org.ballast.Error.") and error.text
        reason = error.text if is_known else str(error)
        raise WriterFailed(reason[:_REASON_MAX], retryable=error.name == RETRYABLE) from error


def _arguments(verb: Verb, arguments: dict[str, Any]) -> tuple[str, list[Any]]:
    """What follows id and deadline."""
    if verb == "prepare":
        facts = {
            "mountpoints": Variant("as", [printable(path) for path in arguments["mountpoints"]]),
            "lease-ms": Variant("t", arguments["lease-ms"]),
        }
        return "a{sv}", [facts]
    if verb == "post":
        return "b", [arguments["held"]]
    if verb == "abort":
        return "s", [printable(str(arguments.get("reason") or ""))]
    return "", []


def _has_left(service: Service) -> bool:
    return service.gone.done() and not service.gone.cancelled()


def _plain(value: Any) -> Any:
    """What JSON has of a D-Bus value; an array of bytes is one of numbers."""
    if isinstance(value, Variant):
        return _plain(value.value)
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, bytes)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
