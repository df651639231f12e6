"""Blocks that failed, and when each may be tried again: later after each failure, as virtio-mem does it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable


class Backoff:
    """A block waits ``first_s`` after its first failure, twice as long after the next, ``most_s`` at most."""

    def __init__(self, first_s: float, most_s: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._first_s = first_s
        self._most_s = most_s
        self._clock = clock
        self._blocks: dict[int, tuple[float, float]] = {}  # its next time, and how long it waits for that

    def __contains__(self, index: int) -> bool:
        """Whether that block has failed and its time has not come."""
        return index in self._blocks and self._blocks[index][0] > self._clock()

    def fail(self, indexes: Iterable[int]) -> None:
        """These have failed, or have failed again."""
        for index in indexes:
            _, waited_s = self._blocks.get(index, (0.0, 0.0))
            wait_s = min(2 * waited_s, self._most_s) or self._first_s
            self._blocks[index] = (self._clock() + wait_s, wait_s)

    def forget(self, indexes: Iterable[int]) -> None:
        """These have not failed, or are gone."""
        for index in indexes:
            self._blocks.pop(index, None)

    def due(self) -> list[int]:
        """Those whose time has come."""
        return sorted(index for index in self._blocks if index not in self)

    def wait_s(self) -> float | None:
        """How long until the next one's time; None if none has failed."""
        next_s = min((at_s for at_s, _ in self._blocks.values()), default=None)
        return None if next_s is None else max(0.0, next_s - self._clock())
