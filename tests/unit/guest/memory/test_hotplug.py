"""What comes is brought online, what was taken offline on purpose stays so."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from ballast.guest.events import Events, Subscription
from ballast.guest.linux.tree import Tree
from ballast.guest.linux.uevents import Uevent
from ballast.guest.memory.backoff import Backoff
from ballast.guest.memory.blocks import MEMORY, Blocks
from ballast.guest.memory.hotplug import STORM_S, Hotplug
from ballast.guest.memory.leaving import LEAVING_S, Leaving
from ballast.guest.memory.onliners import Onliners
from ballast.wire.message import Event

CHANCE_S = 0.05
# SUSE's.
RULE = 'SUBSYSTEM=="memory", ACTION=="add", ATTR{state}=="offline", ATTR{state}="online"'


class Guest:
    """A recorded guest with a DIMM of two blocks, 34 and 35, that are offline."""

    def __init__(self, tree: Tree, path: Path) -> None:
        self.tree = tree
        self.path = path
        self.now_s = 1000.0
        self.heard: asyncio.Queue[Event] = asyncio.Queue()
        self.events = Events()
        self.events.subscribe(Subscription(frozenset({"BALLAST_MEMORY_ADDED", "BALLAST_MEMORY_REMOVED"}), self._take))
        self._tasks: list[asyncio.Task[None]] = []

    def _take(self, event: Event) -> bool:
        self.heard.put_nowait(event)
        return True

    def start(self, *, online: bool = True) -> Hotplug:
        self.leaving = Leaving(self.path.with_name("leaving.json"), clock=lambda: self.now_s)
        self.retry = Backoff(1.0, 64.0, clock=lambda: self.now_s)
        hotplug = Hotplug(
            Blocks(self.tree),
            self.leaving,
            self.events,
            Onliners(self.tree),
            online=online,
            path=self.path,
            chance_s=CHANCE_S,
            retry=self.retry,
        )
        self._tasks.append(asyncio.create_task(hotplug.run()))
        return hotplug

    async def next_event(self) -> tuple[str, list[dict[str, Any]]]:
        async with asyncio.timeout(10):
            event = await self.heard.get()
        return event.name, event.data["blocks"]

    def state(self, index: int) -> str:
        return self.tree.read(f"{MEMORY}/memory{index}/state")

    def set_state(self, index: int, state: str) -> None:
        folder = self.tree.path(f"{MEMORY}/memory{index}")
        folder.mkdir(exist_ok=True)
        (folder / "state").write_text(f"{state}\n")

    def write(self, name: str, text: str) -> None:
        path = self.tree.path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")

    async def settle(self) -> None:
        """Let everything that is ready run: a block that comes after it is onlined, and alone."""
        for _ in range(5):
            await asyncio.sleep(0)

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.wait(self._tasks)


@pytest_asyncio.fixture
async def guest(recorded: Tree, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> AsyncIterator[Guest]:
    caplog.set_level(logging.INFO)
    made = Guest(recorded, tmp_path / "blocks.json")
    yield made
    await made.close()


def uevent(action: str, index: int) -> Uevent:
    return Uevent(action, "memory", f"memory{index}")


async def test_what_is_offline_at_start_is_brought_online(guest: Guest) -> None:
    guest.start()
    name, blocks = await guest.next_event()
    assert name == "BALLAST_MEMORY_ADDED"
    assert [(block["phys-index"], block["zone"], block["result"]) for block in blocks] == [
        (34, "movable", "done"),
        (35, "movable", "done"),
    ]
    assert all(block["online-us"] >= 0 for block in blocks)
    assert guest.state(34) == guest.state(35) == "online_movable"


async def test_blocks_that_come_together_are_one_event(guest: Guest) -> None:
    hotplug = guest.start()
    await guest.next_event()
    for index in range(36, 40):
        guest.set_state(index, "offline")
        hotplug.hear(uevent("add", index))
    _, blocks = await guest.next_event()
    assert [block["phys-index"] for block in blocks] == [36, 37, 38, 39]


@pytest.mark.parametrize("policy", ["online", "online_movable"])
async def test_where_the_kernel_does_it_the_agent_takes_what_stays_offline(
    guest: Guest, caplog: pytest.LogCaptureFixture, policy: str
) -> None:
    guest.write(f"{MEMORY}/auto_online_blocks", policy)
    hotplug = guest.start()
    await guest.next_event()
    for index in (36, 37):
        guest.set_state(index, "offline")
        hotplug.hear(uevent("add", index))
    guest.set_state(36, "online")
    hotplug.hear(uevent("online", 36))
    _, blocks = await guest.next_event()
    assert [(block["phys-index"], block["result"]) for block in blocks] == [(36, "already"), (37, "done")]
    assert caplog.text.count(f"the kernel (auto_online_blocks: {policy}) brings hot-added memory online here") == 1


async def test_a_rule_of_udev_s_that_does_nothing_is_waited_for_once(
    guest: Guest, caplog: pytest.LogCaptureFixture
) -> None:
    guest.write("usr/lib/udev/rules.d/80-hotplug-cpu-mem.rules", RULE)
    hotplug = guest.start()
    await guest.next_event()
    for index in (36, 37):
        guest.set_state(index, "offline")
        hotplug.hear(uevent("add", index))
        _, blocks = await guest.next_event()
        assert [(block["phys-index"], block["result"]) for block in blocks] == [(index, "done")]
    assert caplog.text.count("udev (/usr/lib/udev/rules.d/80-hotplug-cpu-mem.rules) brings") == 1
    assert caplog.text.count("does not bring memory online here: the agent does") == 1


async def test_what_failed_is_tried_again_and_each_time_told(guest: Guest) -> None:
    hotplug = guest.start()
    await guest.next_event()
    guest.set_state(36, "offline")
    state = guest.tree.path(f"{MEMORY}/memory36/state")
    state.unlink()
    state.symlink_to("/proc/version")  # not even root can write to it
    hotplug.hear(uevent("add", 36))
    assert [(one["phys-index"], one["result"]) for one in (await guest.next_event())[1]] == [(36, "failed")]
    for index, result in ((37, "failed"), (38, "done")):
        guest.now_s += 2.0
        if result == "done":
            state.unlink()
            state.write_text("offline")
        guest.set_state(index, "offline")
        hotplug.hear(uevent("add", index))
        told = {one["phys-index"]: one["result"] for one in (await guest.next_event())[1]}
        assert told == {36: result, index: "done"}
    assert guest.retry.wait_s() is None


@pytest.mark.parametrize("missing", ["proc/iomem", "proc/zoneinfo"])
async def test_what_cannot_be_read_for_want_of_memory_is_read_later(guest: Guest, missing: str) -> None:
    hotplug = guest.start()
    await guest.next_event()
    there, away = guest.tree.path(missing), guest.path.with_name("away")
    there.rename(away)
    guest.set_state(36, "offline")
    hotplug.hear(uevent("add", 36))
    while guest.retry.wait_s() is None:  # noqa: ASYNC110 - nothing is published of it
        await asyncio.sleep(0)
    away.rename(there)
    guest.now_s += 2.0
    guest.set_state(37, "offline")
    hotplug.hear(uevent("add", 37))
    _, blocks = await guest.next_event()
    assert [(block["phys-index"], block["result"]) for block in blocks] == [(37, "done"), (36, "done")]


@pytest.mark.parametrize("action", ["offline", "remove", "online"])
async def test_what_failed_and_is_nobody_s_wish_any_more_is_let_be(guest: Guest, action: str) -> None:
    hotplug = guest.start()
    await guest.next_event()
    guest.retry.fail([33])
    if action == "offline":
        guest.set_state(33, "offline")
    hotplug.hear(uevent(action, 33))
    if action == "remove":
        assert (await guest.next_event())[0] == "BALLAST_MEMORY_REMOVED"
    guest.now_s += 2.0
    guest.set_state(36, "offline")
    hotplug.hear(uevent("add", 36))
    _, blocks = await guest.next_event()
    assert [block["phys-index"] for block in blocks] == [36]
    assert guest.retry.wait_s() is None


async def test_lost_uevents_make_it_look_anew(guest: Guest) -> None:
    hotplug = guest.start()
    await guest.next_event()
    guest.set_state(36, "offline")
    hotplug.hear(None)
    _, blocks = await guest.next_event()
    assert [block["phys-index"] for block in blocks] == [36]


async def test_uevents_are_read_at_once_but_in_a_storm(guest: Guest) -> None:
    hotplug = guest.start()
    await guest.next_event()
    loop = asyncio.get_running_loop()
    for action, least_s in (("online", 0.0), ("add", STORM_S), ("online", 0.0)):
        hotplug.hear(uevent(action, 36))
        began_s = loop.time()
        async with asyncio.timeout(10):
            await hotplug.wait_to_hear()
        assert loop.time() - began_s >= least_s


async def test_a_removed_block_is_told_and_forgotten(guest: Guest) -> None:
    hotplug = guest.start()
    await guest.next_event()
    hotplug.hear(uevent("remove", 32))
    assert await guest.next_event() == ("BALLAST_MEMORY_REMOVED", [{"phys-index": 32}])


@pytest.mark.parametrize("restart", [False, True])
async def test_what_was_taken_offline_on_purpose_stays_so(guest: Guest, *, restart: bool) -> None:
    hotplug = guest.start()
    await guest.next_event()
    for index in (33, 34):
        guest.set_state(index, "offline")
        hotplug.hear(uevent("offline", index))
    guest.set_state(34, "online")
    hotplug.hear(uevent("online", 34))
    assert json.loads(guest.path.read_text()) == [33]
    guest.set_state(36, "offline")
    if restart:
        guest.start()
    else:
        hotplug.hear(None)
    _, blocks = await guest.next_event()
    assert [block["phys-index"] for block in blocks] == [36]
    assert guest.state(33) == "offline"


async def test_what_was_offline_on_purpose_and_is_plugged_anew_is_new(guest: Guest) -> None:
    hotplug = guest.start()
    await guest.next_event()
    guest.set_state(33, "offline")
    for action in ("offline", "remove", "add"):
        hotplug.hear(uevent(action, 33))
    assert (await guest.next_event())[0] == "BALLAST_MEMORY_REMOVED"
    _, blocks = await guest.next_event()
    assert [block["phys-index"] for block in blocks] == [33]
    assert json.loads(guest.path.read_text()) == []


def leave(guest: Guest, hotplug: Hotplug, *indexes: int) -> None:
    """What a request to take these offline does, and what the kernel says of it."""
    guest.leaving.begin(dict.fromkeys(indexes, "kernel"))
    for index in indexes:
        guest.set_state(index, "offline")
        hotplug.hear(uevent("offline", index))


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("online", [False, True])
async def test_what_is_leaving_stays_offline_for_its_minute_and_is_then_online_in_its_zone(
    guest: Guest, *, online: bool, restart: bool
) -> None:
    hotplug = guest.start(online=True)
    await guest.next_event()
    leave(guest, hotplug, 32, 33)
    guest.leaving.end([32, 33])
    hotplug.hear(None)
    if restart or not online:
        await guest.close()
        hotplug = guest.start(online=online)
    await guest.settle()
    assert (guest.state(32), guest.state(33), guest.heard.empty()) == ("offline", "offline", True)
    assert guest.leaving.indexes() == [32, 33]
    guest.now_s += LEAVING_S
    guest.leaving.forget([])
    guest.leaving.renew([])  # anything that makes it look at the clock
    name, blocks = await guest.next_event()
    assert name == "BALLAST_MEMORY_ADDED"
    assert [(one["phys-index"], one["zone"], one["result"]) for one in blocks] == [
        (32, "kernel", "done"),
        (33, "kernel", "done"),
    ]
    assert guest.leaving.indexes() == []


async def test_a_dimm_that_a_dead_agent_left_half_offline_is_online_at_once(guest: Guest) -> None:
    hotplug = guest.start()
    await guest.next_event()
    leave(guest, hotplug, 32)
    await guest.close()
    guest.start()
    _, blocks = await guest.next_event()
    assert [(one["phys-index"], one["zone"]) for one in blocks] == [(32, "kernel")]


@pytest.mark.parametrize("action", ["online", "remove"])
async def test_what_is_online_or_gone_is_leaving_no_more(guest: Guest, action: str) -> None:
    hotplug = guest.start()
    await guest.next_event()
    leave(guest, hotplug, 32)
    guest.leaving.end([32])
    hotplug.hear(uevent(action, 32))
    assert guest.leaving.indexes() == []


async def test_lost_uevents_make_it_forget_who_has_left(guest: Guest) -> None:
    hotplug = guest.start()
    await guest.next_event()
    leave(guest, hotplug, 32, 33)
    guest.leaving.end([32, 33])
    guest.set_state(32, "online")
    hotplug.hear(None)
    assert guest.leaving.indexes() == [33]


@pytest.mark.parametrize("content", ["", "garbage", "5", "{", "[[]]", "\udcff"])
async def test_a_spoiled_list_is_no_list(guest: Guest, content: str) -> None:
    guest.path.write_text(content, errors="surrogateescape")
    guest.start()
    _, blocks = await guest.next_event()
    assert [block["phys-index"] for block in blocks] == [34, 35]


async def test_switched_off_it_onlines_nothing_and_still_tells_of_removals(guest: Guest) -> None:
    hotplug = guest.start(online=False)
    hotplug.hear(uevent("add", 34))
    await guest.settle()
    hotplug.hear(uevent("remove", 32))
    assert (await guest.next_event())[0] == "BALLAST_MEMORY_REMOVED"
    assert guest.state(34) == "offline"


@pytest.mark.parametrize("name", ["memory", "memoryx", "memory-1", "node0", "", "cpu3"])
async def test_other_devices_of_the_subsystem_are_nothing_to_us(guest: Guest, name: str) -> None:
    hotplug = guest.start()
    await guest.next_event()
    for action in ("add", "offline", "remove"):
        hotplug.hear(Uevent(action, "memory", name))
    await guest.settle()
    assert guest.heard.empty()
    assert not guest.path.exists()
