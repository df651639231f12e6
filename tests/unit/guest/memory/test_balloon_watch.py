"""What is done while the balloon holds something, and only then."""

from __future__ import annotations

import asyncio

from ballast.guest.events import Events
from ballast.guest.linux.tree import Tree
from ballast.guest.memory.balloon import Balloon
from ballast.guest.memory.balloon_watch import BalloonWatch
from ballast.guest.memory.sleep import SleepLock

EVERY_S = 0.02


class Looked(Balloon):
    """A balloon that counts the looks."""

    looks = 0
    looked_twice: asyncio.Event

    async def look_again(self) -> None:
        """Count."""
        self.looks += 1
        if self.looks == 2:
            self.looked_twice.set()


class Lock(SleepLock):
    """A lock that only says whether it is wanted."""

    is_wanted = False

    def hold(self) -> None:
        """Wanted."""
        self.is_wanted = True

    def release(self) -> None:
        """Not wanted."""
        self.is_wanted = False


async def test_it_looks_and_has_a_lock_while_something_is_held(recorded: Tree) -> None:
    events = Events()
    balloon = Looked(recorded, events, boot_id="b")
    balloon.looked_twice = asyncio.Event()
    lock = Lock(balloon.give_back_before_sleep, is_frozen=lambda: False)
    task = asyncio.create_task(BalloonWatch(balloon, events, lock, every_s=EVERY_S).run())
    await asyncio.sleep(3 * EVERY_S)
    assert (balloon.looks, lock.is_wanted) == (0, False)
    events.publish("BALLAST_BALLOON", {"cause": "inflate", "total-bytes": 1})
    async with asyncio.timeout(10):
        await balloon.looked_twice.wait()
    assert lock.is_wanted
    events.publish("BALLAST_BALLOON", {"cause": "deflate", "total-bytes": 0})
    await asyncio.sleep(EVERY_S)
    before = balloon.looks
    await asyncio.sleep(5 * EVERY_S)
    assert (balloon.looks, lock.is_wanted) == (before, False)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
