"""The services on the system bus that want to take part in a freeze, and those that an earlier agent left prepared."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from ballast.guest.bus import Bus
from ballast.guest.quiesce.markers import MARKERS, services_of
from ballast.guest.quiesce.writer import Writer, WriterFailed, read_description
from ballast.guest.quiesce.writer_service import Prepared, Service, WriterService, abort, take_prepared
from ballast.wire.errors import BadRequest, Busy, Frozen, NoSuchId

log = logging.getLogger(__name__)

_MARKERS = services_of(MARKERS)
_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,63}")  # as of programs
_SERVICES_MAX = 32
_ABORT_S = 60.0


class Services:
    """Those that registered, by name; forgotten when they or the bus go away. ``run`` undoes what was left."""

    def __init__(self, bus: Bus, *, is_frozen: Callable[[], bool], markers: Path = _MARKERS) -> None:
        self._bus = bus
        self._is_frozen = is_frozen
        self._markers = markers
        self._services: dict[str, Service] = {}

    async def run(self, wait_thawed: Callable[[], Awaitable[None]]) -> None:
        """Have those undone that were left prepared, each time when there is a bus; the first after ``wait_thawed``."""
        await wait_thawed()
        while True:
            lost = await self._bus.wait_connected()
            left = take_prepared(self._markers)
            await asyncio.gather(*(self._undo(prepared) for prepared in left))
            await asyncio.wait({lost})

    def writers(self) -> list[Writer]:
        """One for each that is registered, for one session."""
        return [WriterService(service, self._bus, self._markers) for _, service in sorted(self._services.items())]

    async def register(self, name: str, owner: str, path: str, description: dict[str, Any]) -> None:
        """Take in a service, or what it says of itself anew. BadRequest, Busy, Frozen; BusError, OSError."""
        if self._is_frozen():
            raise Frozen("a freeze is at work: try again when FreezeState is thawed")
        if not _NAME.fullmatch(name):
            raise BadRequest("a name has 1 to 64 lower-case letters, digits and '-'", argument="name")
        try:
            read_description(description, {})
        except WriterFailed as error:
            raise BadRequest(error.reason, argument="description") from error
        self._refuse_taken(name, owner)
        gone = await self._bus.watch(owner)
        self._refuse_taken(name, owner)
        service = self._services[name] = Service(name, owner, path, description, gone)
        gone.add_done_callback(lambda _: self._forget(service))
        log.info("dbus%s registered the writer %s", owner, name)

    def unregister(self, name: str, owner: str) -> None:
        """No later freeze asks it. NoSuchId if it is not registered by ``owner``."""
        service = self._services.get(name)
        if service is None or service.owner != owner:
            raise NoSuchId(f"you have registered no writer {name}")
        self._forget(service)

    def _refuse_taken(self, name: str, owner: str) -> None:
        service = self._services.get(name)
        if service is not None and service.owner != owner:
            raise Busy(f"the writer {name} is registered by {service.owner}")
        if service is None and len(self._services) >= _SERVICES_MAX:
            raise Busy(f"{_SERVICES_MAX} writers are registered")

    def _forget(self, service: Service) -> None:
        if self._services.get(service.name) is service:
            del self._services[service.name]
            log.info("the writer %s of dbus%s is no longer registered", service.name, service.owner)

    async def _undo(self, prepared: Prepared) -> None:
        try:
            await abort(self._bus, prepared, "the agent was restarted", timeout_s=_ABORT_S)
        except WriterFailed as error:
            log.error("writer %s may not be undone: %s", prepared.name, error.reason)  # noqa: TRY400 - no bug of ours
        else:
            log.info("writer %s was undone, whom an earlier agent had prepared", prepared.name)
