"""Fan-out of events: each subscriber counts for itself, and one that takes no more is forgotten."""

from __future__ import annotations

import time

from ballast.guest.events import Events, Subscription
from ballast.wire.memory_names import BlockResult
from ballast.wire.message import Event


class Ear:
    """A subscriber that takes so many events."""

    def __init__(self, *names: str, takes: int = 100) -> None:
        self.heard: list[Event] = []
        self.subscription = Subscription(frozenset(names), self._deliver)
        self._takes = takes

    def _deliver(self, event: Event) -> bool:
        self.heard.append(event)
        return len(self.heard) <= self._takes


def test_each_subscriber_hears_what_it_named_with_its_own_count() -> None:
    events, both, one = Events(), Ear("A", "B"), Ear("B")
    events.subscribe(both.subscription)
    events.publish("A", {})
    events.subscribe(one.subscription)
    events.publish("B", {"x": 1})
    events.publish("C", {})
    assert [(event.name, event.seq) for event in both.heard] == [("A", 1), ("B", 2)]
    assert [(event.name, event.seq, event.data) for event in one.heard] == [("B", 1, {"x": 1})]


def test_a_subscription_counts_on_over_what_is_sent_to_it_alone() -> None:
    events, ear = Events(), Ear("A")
    events.subscribe(ear.subscription)
    events.publish("A", {})
    ear.subscription.send("OWN", {})
    events.publish("A", {})
    assert [event.seq for event in ear.heard] == [1, 2, 3]


def test_one_that_takes_no_more_gets_no_more_and_others_go_on() -> None:
    events, full, fine = Events(), Ear("A", takes=1), Ear("A")
    events.subscribe(full.subscription)
    events.subscribe(fine.subscription)
    for _ in range(3):
        events.publish("A", {})
    assert len(full.heard) == 2
    assert len(fine.heard) == 3


def test_unsubscribed_hears_nothing_and_may_be_unsubscribed_again() -> None:
    events, ear = Events(), Ear("A")
    events.subscribe(ear.subscription)
    for _ in range(2):
        events.unsubscribe(ear.subscription)
    events.publish("A", {})
    assert ear.heard == []


def test_records_are_sent_in_wire_names_and_with_the_time() -> None:
    events, ear = Events(), Ear("A")
    events.subscribe(ear.subscription)
    before_us = time.time_ns() // 1000
    events.publish("A", {"blocks": [BlockResult(8, "movable", "done", online_us=5)]})
    (event,) = ear.heard
    assert event.data == {"blocks": [{"phys-index": 8, "zone": "movable", "result": "done", "online-us": 5}]}
    assert before_us <= event.timestamp_us <= time.time_ns() // 1000
