"""Brings hot-added memory online: what is offline at start, and then what uevents tell of.

What somebody took offline on purpose stays so. The kernel tells of it ("offline"), and it is written down in /run for
a restarted agent. What was taken offline for the host stays so for as long as it is ``Leaving``.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from pathlib import Path

from ballast.guest.events import Events
from ballast.guest.linux.uevents import Uevent
from ballast.guest.memory.blocks import Blocks
from ballast.guest.memory.leaving import Leaving
from ballast.wire.errors import AgentError
from ballast.wire.memory_names import BlockResult

log = logging.getLogger(__name__)

LEFT_OFFLINE_PATH = Path("/run/ballast/blocks.json")


class Hotplug:
    """``run`` does the work; ``hear`` is told of each uevent of the memory subsystem, None if some were lost."""

    def __init__(
        self, blocks: Blocks, leaving: Leaving, events: Events, *, online: bool, path: Path = LEFT_OFFLINE_PATH
    ) -> None:
        self._blocks = blocks
        self._leaving = leaving
        self._events = events
        self._online = online
        self._path = path
        self._left_offline: set[int] = set()
        self._added: set[int] = set()
        self._wake = asyncio.Event()

    def hear(self, uevent: Uevent | None) -> None:
        """Take in one uevent; never blocks."""
        if uevent is None:
            self._look()
        elif uevent.name.startswith("memory") and uevent.name[6:].isdigit():
            self._take_in(uevent.action, int(uevent.name[6:]))
        if self._added:
            self._wake.set()

    async def run(self) -> None:
        """Online what is offline, then whatever comes, and what was to leave and did not."""
        self._left_offline = self._read_left_offline()
        self._look()
        async with asyncio.TaskGroup() as group:
            group.create_task(self._watch_added())
            group.create_task(self._watch_leaving())

    def _look(self) -> None:
        """Take in what there is, by sysfs."""
        offline = set(self._blocks.offline_indexes())
        self._leaving.forget(set(self._leaving.indexes()) - offline)
        self._added |= offline - self._left_offline - set(self._leaving.indexes())

    async def _watch_added(self) -> None:
        while True:
            if self._added and self._online:
                await self._online_added()
            else:
                self._added.clear()
            if not self._added:
                self._wake.clear()
                await self._wake.wait()

    async def _watch_leaving(self) -> None:
        while True:
            await self._leaving.wait_due()
            async with self._blocks.changing:
                due = self._leaving.due()
                self._leaving.forget(due.keys() - set(self._blocks.offline_indexes()))
                # Whatever the configuration says of hot-added memory: these were online before.
                results = await self._blocks.bring_back(self._leaving.due())
                self._leaving.renew(one.phys_index for one in results if one.result == "failed")
                self._leaving.forget(one.phys_index for one in results if one.result != "failed")
            self._tell("memory that did not leave", results)

    def _take_in(self, action: str, index: int) -> None:
        if action == "add":
            self._added.add(index)
        elif action == "remove":
            self._added.discard(index)
            self._leaving.forget([index])
            self._leave(index, offline=False)
            self._events.publish("BALLAST_MEMORY_REMOVED", {"blocks": [{"phys-index": index}]})
        elif action == "online":
            self._leaving.forget([index])
            self._leave(index, offline=False)
        elif action == "offline" and index not in self._leaving:
            self._leave(index, offline=True)

    async def _online_added(self) -> None:
        indexes = sorted(self._added)
        self._added.clear()
        present = set(self._blocks.offline_indexes())
        try:
            result = await self._blocks.online(indexes=[index for index in indexes if index in present])
        except AgentError as error:
            log.warning("cannot bring hot-added memory online: %s", error.desc)
            return
        self._tell("hot-added memory", result.blocks)

    def _tell(self, what: str, results: list[BlockResult]) -> None:
        failed = [one for one in results if one.result == "failed"]
        for one in failed:
            log.error("memory block %d stays offline: %s", one.phys_index, one.reason)
        if results:
            log.info("%s: %d blocks online, %d failed", what, len(results) - len(failed), len(failed))
            self._events.publish("BALLAST_MEMORY_ADDED", {"blocks": results})

    def _leave(self, index: int, *, offline: bool) -> None:
        if (index in self._left_offline) == offline:
            return
        self._left_offline ^= {index}
        with contextlib.suppress(OSError):  # a tmpfs; without it a restarted agent onlines them, no more
            self._path.write_text(json.dumps(sorted(self._left_offline)))

    def _read_left_offline(self) -> set[int]:
        try:
            return set(json.loads(self._path.read_text()))
        except (OSError, ValueError, TypeError):
            return set()
