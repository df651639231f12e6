"""What was decided about memory, from which numbers, and why: the last of it on request, all of it in the journal.

Whoever changes memory, or was asked to and does not, notes it here, in one line beside what it does.
"""

from __future__ import annotations

import logging
import time
from collections import deque

from ballast.wire.memory_names import Change, ChangeReason, Decision
from ballast.wire.shape import wire_name

log = logging.getLogger(__name__)

KEPT = 64
_REFUSALS = ("not-inflated", "online-failed", "offline-failed")
_WARNINGS = (*_REFUSALS, "gave-way", "holder-lost")


class Decisions:
    """The last of them since the agent started; nothing in it blocks, and all may run while frozen."""

    def __init__(self) -> None:
        self._kept: deque[Decision] = deque(maxlen=KEPT)

    def note(self, change: Change, reason: ChangeReason, bytes_: int, **numbers: float) -> None:
        """Keep a decision and tell the journal; ``numbers`` are what it was made from, with units in their names.

        A refusal that is only repeated takes the place of the one before, and the journal has it once.
        """
        named = {wire_name(name): value for name, value in numbers.items()}
        decision = Decision(time.time_ns() // 1_000_000, change, bytes_, reason, named)
        if change in _REFUSALS and self._kept and (self._kept[-1].change, self._kept[-1].reason) == (change, reason):
            self._kept[-1] = decision
            return
        self._kept.append(decision)
        fields = {"CHANGE": change, "REASON": reason, "BYTES": bytes_, **{n.upper(): v for n, v in numbers.items()}}
        told = "".join(f", {name} {round(value, 2)}" for name, value in named.items())
        level = logging.WARNING if change in _WARNINGS else logging.INFO
        log.log(level, "memory %s: %d bytes, %s%s", change, bytes_, reason, told, extra=fields)

    def last(self) -> list[Decision]:
        """What is kept, the newest last."""
        return list(self._kept)
