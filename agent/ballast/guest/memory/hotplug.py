"""Brings hot-added memory online: what is offline at start, and then what uevents tell of.

What somebody took offline on purpose stays so. The kernel tells of it ("offline"), and it is written down in /run for
a restarted agent.
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
from ballast.wire.errors import AgentError

log = logging.getLogger(__name__)

LEFT_OFFLINE_PATH = Path("/run/ballast/blocks.json")


class Hotplug:
    """``run`` does the work; ``hear`` is told of each uevent of the memory subsystem, None if some were lost."""

    def __init__(self, blocks: Blocks, events: Events, *, online: bool, path: Path = LEFT_OFFLINE_PATH) -> None:
        self._blocks = blocks
        self._events = events
        self._online = online
        self._path = path
        self._left_offline: set[int] = set()
        self._added: set[int] = set()
        self._wake = asyncio.Event()

    def hear(self, uevent: Uevent | None) -> None:
        """Take in one uevent; never blocks."""
        if uevent is None:
            self._added |= set(self._blocks.offline_indexes()) - self._left_offline
        elif uevent.name.startswith("memory") and uevent.name[6:].isdigit():
            self._take_in(uevent.action, int(uevent.name[6:]))
        if self._added:
            self._wake.set()

    async def run(self) -> None:
        """Online what is offline, then whatever comes."""
        self._left_offline = self._read_left_offline()
        self._added |= set(self._blocks.offline_indexes()) - self._left_offline
        while True:
            if self._added and self._online:
                await self._online_added()
            else:
                self._added.clear()
            if not self._added:
                self._wake.clear()
                await self._wake.wait()

    def _take_in(self, action: str, index: int) -> None:
        if action == "add":
            self._added.add(index)
        elif action == "remove":
            self._added.discard(index)
            self._leave(index, offline=False)
            self._events.publish("BALLAST_MEMORY_REMOVED", {"blocks": [{"phys-index": index}]})
        elif action in ("online", "offline"):
            self._leave(index, offline=action == "offline")

    async def _online_added(self) -> None:
        indexes = sorted(self._added)
        self._added.clear()
        present = set(self._blocks.offline_indexes())
        try:
            result = await self._blocks.online(indexes=[index for index in indexes if index in present])
        except AgentError as error:
            log.warning("cannot bring hot-added memory online: %s", error.desc)
            return
        failed = [block for block in result.blocks if block.result == "failed"]
        for block in failed:
            log.error("memory block %d stays offline: %s", block.phys_index, block.reason)
        if result.blocks:
            log.info("hot-added memory: %d bytes online, %d blocks failed", result.bytes, len(failed))
            self._events.publish("BALLAST_MEMORY_ADDED", {"blocks": result.blocks})

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
