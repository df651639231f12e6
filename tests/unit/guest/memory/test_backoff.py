"""What failed waits longer each time, and no longer than it may."""

from __future__ import annotations

from ballast.guest.memory.backoff import Backoff


def test_each_failure_doubles_the_wait() -> None:
    now_s = [0.0]
    backoff = Backoff(50.0, 300.0, clock=lambda: now_s[0])
    assert (backoff.wait_s(), backoff.due(), 7 in backoff) == (None, [], False)
    for wait_s in (50.0, 100.0, 200.0, 300.0, 300.0):
        backoff.fail([7])
        assert (backoff.wait_s(), 7 in backoff, backoff.due()) == (wait_s, True, [])
        now_s[0] += wait_s
        assert (backoff.wait_s(), 7 in backoff, backoff.due()) == (0.0, False, [7])
    backoff.forget([7, 8])
    assert (backoff.wait_s(), backoff.due()) == (None, [])
    backoff.fail([7])
    assert backoff.wait_s() == 50.0
