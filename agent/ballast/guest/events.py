"""Bounded fan-out of events: capabilities publish, peers subscribe.

Publishing never waits. A subscriber whose queue is full has stopped reading: it is told so by its ``overflow``, and
gets nothing more.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from ballast.wire.message import Event
from ballast.wire.shape import to_wire

NAMES = (
    "BALLAST_PRESSURE",
    "BALLAST_DEMAND",
    "BALLAST_MEMORY_ADDED",
    "BALLAST_MEMORY_REMOVED",
    "BALLAST_BALLOON",
    "BALLAST_QUIESCE",
    "BALLAST_IDENTITY",
)


class Subscription:
    """What one subscriber wants, and its own count of what it was sent."""

    def __init__(self, names: frozenset[str], deliver: Callable[[Event], bool]) -> None:
        self.names = names
        self._deliver = deliver
        self._seq = 0

    def send(self, name: str, data: dict[str, Any]) -> bool:
        """Hand over one event; False if the subscriber took it not."""
        self._seq += 1
        return self._deliver(Event(name, data, self._seq, time.time_ns() // 1000))


class Events:
    """The subscribers of one agent."""

    def __init__(self) -> None:
        self._subscriptions: list[Subscription] = []

    def subscribe(self, subscription: Subscription) -> None:
        """Send it what is published from now on."""
        self._subscriptions.append(subscription)

    def unsubscribe(self, subscription: Subscription) -> None:
        """Send it nothing more; unknown ones are no error."""
        if subscription in self._subscriptions:
            self._subscriptions.remove(subscription)

    def publish(self, name: str, record: Any) -> None:
        """Send a record or mapping to all who want ``name``; never waits."""
        data = to_wire(record)
        for subscription in [s for s in self._subscriptions if name in s.names]:
            if not subscription.send(name, data):
                self.unsubscribe(subscription)
