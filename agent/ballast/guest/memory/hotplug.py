"""Brings hot-added memory online: what is offline at start, and then what uevents tell of.

What somebody took offline on purpose stays so. The kernel tells of it ("offline"), and it is written down in /run for
a restarted agent. What was taken offline for the host stays so for as long as it is ``Leaving``. Where somebody else
brings memory online, the kernel or a rule of udev's, the agent takes what they leave.

When memory comes it is short: bringing it online takes no disk, no other process and a thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections import deque
from pathlib import Path

from ballast.guest.events import Events
from ballast.guest.linux.uevents import Uevent
from ballast.guest.memory.backoff import Backoff
from ballast.guest.memory.blocks import Blocks
from ballast.guest.memory.leaving import Leaving
from ballast.guest.memory.onliners import Onliners
from ballast.wire.errors import AgentError
from ballast.wire.memory_names import BlockResult, ChangeReason

log = logging.getLogger(__name__)

LEFT_OFFLINE_PATH = Path("/run/ballast/blocks.json")
RETRY_FIRST_S, RETRY_MOST_S = 1.0, 64.0
CHANCE_S = 2.0  # udev takes 1.4 s for 64 blocks, in an idle guest under emulation
STORM_S = 0.01
READ_EVERY_S, READ_AFTER_BLOCKS = 0.5, 64  # the kernel keeps some 250 uevents for us


class Hotplug:
    """``run`` does the work; ``hear`` is told of each uevent of the memory subsystem, None if some were lost."""

    def __init__(
        self,
        blocks: Blocks,
        leaving: Leaving,
        events: Events,
        onliners: Onliners,
        *,
        online: bool,
        path: Path = LEFT_OFFLINE_PATH,
        chance_s: float = CHANCE_S,
        retry: Backoff | None = None,
    ) -> None:
        self._blocks = blocks
        self._leaving = leaving
        self._events = events
        self._onliners = onliners
        self._online = online
        self._path = path
        self._chance_s = chance_s
        self._retry = retry or Backoff(RETRY_FIRST_S, RETRY_MOST_S)
        self._left_offline: set[int] = set()
        # The thread that onlines takes from its left end, while uevents add to the right one.
        self._added: deque[int] = deque()
        self._by_others: list[int] = []
        self._are_new = self._is_storm = False
        self._wake = asyncio.Event()
        self._is_under_way = False
        self._may_hear = asyncio.Event()

    def hear(self, uevent: Uevent | None) -> None:
        """Take in one uevent; never blocks."""
        if uevent is None:
            self._look()
            self._are_new = True
        elif uevent.name.startswith("memory") and uevent.name[6:].isdigit():
            self._take_in(uevent.action, int(uevent.name[6:]))

    async def wait_to_hear(self) -> None:
        """Wait 10 ms where blocks have just come, and while they come online, for 64 of them and half a second at most.

        Each of them is a uevent, and of two threads of Python one runs: to read each at once took twice as long.
        """
        if self._is_storm and not self._is_under_way:
            self._is_storm = False
            await asyncio.sleep(STORM_S)
        if self._is_under_way:
            self._may_hear.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(READ_EVERY_S):
                    await self._may_hear.wait()

    async def run(self) -> None:
        """Online what is offline, then whatever comes, and what was to leave and did not."""
        self._left_offline = self._read_left_offline()
        if self._online:
            self._onliners.find()
        self._look()
        async with asyncio.TaskGroup() as group:
            group.create_task(self._watch_added())
            group.create_task(self._watch_leaving())

    def _look(self) -> None:
        """Take in what there is, by sysfs."""
        offline = set(self._blocks.offline_indexes())
        self._leaving.forget(set(self._leaving.indexes()) - offline)
        self._add(*sorted(offline - self._left_offline - set(self._leaving.indexes())))

    def _add(self, *indexes: int) -> None:
        if self._online:
            self._added.extend(indexes)
            self._wake.set()

    async def _watch_added(self) -> None:
        while True:
            await self._wait_for_work()
            if self._are_new and (who := self._onliners.find()):
                await self._let_others(who)
            self._are_new = False
            await self._online_added()

    async def _wait_for_work(self) -> None:
        """Until blocks have been added, or the time of one that failed has come."""
        self._add_due()
        while not self._added:
            self._wake.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._retry.wait_s()):
                    await self._wake.wait()
            self._add_due()

    def _add_due(self) -> None:
        """What failed is tried again when its time has come, if it is still there to be."""
        for index in self._retry.due():
            is_wanted = index not in self._left_offline and index not in self._leaving
            if is_wanted and self._blocks.state(index) not in (None, "online"):
                self._added.append(index)
            else:
                self._retry.forget([index])

    async def _let_others(self, who: str) -> None:
        """Let them do it, for as long as they get on with it."""
        while self._added:
            self._wake.clear()
            try:
                async with asyncio.timeout(self._chance_s):
                    await self._wake.wait()
            except TimeoutError:
                break
        if not self._by_others and who.startswith("udev"):
            self._onliners.disprove_rule()

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
            self._tell("memory that did not leave", results, "not-unplugged")

    def _take_in(self, action: str, index: int) -> None:
        if action == "add":
            self._are_new = self._is_storm = True
            self._add(index)
        elif action == "remove":
            self._retry.forget([index])
            self._leaving.forget([index])
            self._leave(index, offline=False)
            self._events.publish("BALLAST_MEMORY_REMOVED", {"blocks": [{"phys-index": index}]})
        elif action == "online":
            self._leaving.forget([index])
            self._leave(index, offline=False)
            with contextlib.suppress(ValueError):
                self._added.remove(index)
                self._by_others.append(index)
                self._wake.set()
        elif action == "offline" and index not in self._leaving:
            self._leave(index, offline=True)

    async def _online_added(self) -> None:
        by_others, self._by_others = self._by_others, []
        results = [BlockResult(index, self._blocks.zone(index), "already") for index in sorted(by_others)]
        loop, taken = asyncio.get_running_loop(), list[int]()

        def next_added() -> int | None:
            """Uevents can wait from the second block on: before that the kernel is still telling of new ones."""
            self._is_under_way = bool(taken)
            try:
                taken.append(self._added.popleft())
            except IndexError:
                return None
            if len(taken) % READ_AFTER_BLOCKS == 0:
                loop.call_soon_threadsafe(self._may_hear.set)
            return taken[-1]

        try:
            results += await self._blocks.online_next(next_added)
        except (AgentError, OSError, RuntimeError) as error:
            # No memory to read a file of the kernel's, or for the thread.
            self._retry.fail([*taken, *self._added])
            self._added.clear()
            log.warning("cannot bring hot-added memory online now, will try again: %s", error)
        finally:
            self._is_under_way = False
            self._may_hear.set()
        self._retry.forget(one.phys_index for one in results if one.result != "failed")
        self._retry.fail(one.phys_index for one in results if one.result == "failed")
        self._tell("hot-added memory", results, "zone-rule")

    def _tell(self, what: str, results: list[BlockResult], reason: ChangeReason) -> None:
        failed = [one for one in results if one.result == "failed"]
        for one in failed:
            wait_s = self._retry.wait_s()
            log.error("memory block %d stays offline: %s; next try in %d s", one.phys_index, one.reason, wait_s or 0)
        if results:
            log.info("%s: %d blocks online, %d failed", what, len(results) - len(failed), len(failed))
            self._blocks.note(results, reason)
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
