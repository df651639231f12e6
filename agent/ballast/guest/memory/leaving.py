"""Blocks that are leaving: taken offline for the host, and not to be brought online again behind its back.

That holds until the host asks for them, the DIMM is gone or a minute has passed. The record is in /run, so that it
holds for a restarted agent too; but of blocks whose DIMM was not finished it says that their time is over, so that an
agent which died in the middle leaves no DIMM half offline.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from ballast.wire.memory_names import Zone

LEAVING_PATH = Path("/run/ballast/leaving.json")
LEAVING_S = 60.0


def read_boottime_s() -> float:
    """CLOCK_BOOTTIME: goes on while the guest is suspended, and /run does not outlive it."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Leaving:
    """The blocks by index: the zone that each was in, and when its time is over; never, while its DIMM is under way."""

    def __init__(self, path: Path = LEAVING_PATH, *, clock: Callable[[], float] = read_boottime_s) -> None:
        self._path = path
        self._clock = clock
        self._changed = asyncio.Event()
        self._blocks: dict[int, tuple[Zone, float]] = self._read()

    def __contains__(self, index: int) -> bool:
        """Whether that block is leaving."""
        return index in self._blocks

    def zone(self, index: int) -> Zone:
        """Zone that a leaving block was in."""
        return self._blocks[index][0]

    def begin(self, zones: Mapping[int, Zone]) -> None:
        """These are about to be taken offline."""
        self._change({index: (zone, math.inf) for index, zone in zones.items()}, gone=())

    def end(self, indexes: Iterable[int]) -> None:
        """Of what was begun, these are offline now, and have a minute from now; the others are not leaving.

        So have those that were leaving before, unless they were forgotten meanwhile.
        """
        under_way = [index for index, (_, until_s) in self._blocks.items() if until_s == math.inf]
        self._change(self._for_a_minute(indexes), gone=under_way)

    def renew(self, indexes: Iterable[int]) -> None:
        """These stay offline for a minute from now."""
        self._change(self._for_a_minute(indexes), gone=())

    def forget(self, indexes: Iterable[int]) -> None:
        """These are online again, or gone. What is under way goes on."""
        gone = [index for index in indexes if self._blocks.get(index, ("", math.inf))[1] != math.inf]
        if gone:
            self._change({}, gone=gone)

    def indexes(self) -> list[int]:
        """All that are leaving."""
        return sorted(self._blocks)

    def due(self) -> dict[int, Zone]:
        """Blocks whose time is over, with the zones that they were in."""
        now_s = self._clock()
        return {index: zone for index, (zone, until_s) in self._blocks.items() if until_s <= now_s}

    async def wait_due(self) -> None:
        """Wait until the time of some is over."""
        while not self.due():
            self._changed.clear()
            next_s = min((until_s for _, until_s in self._blocks.values()), default=math.inf)
            # The loop's clock stands still while the guest is suspended, so this may come late by that; never early.
            wait_s = None if next_s == math.inf else max(0.0, next_s - self._clock())
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self._changed.wait()

    def _for_a_minute(self, indexes: Iterable[int]) -> dict[int, tuple[Zone, float]]:
        until_s = self._clock() + LEAVING_S
        return {index: (self.zone(index), until_s) for index in indexes if index in self}

    def _change(self, blocks: Mapping[int, tuple[Zone, float]], *, gone: Iterable[int]) -> None:
        for index in gone:
            self._blocks.pop(index, None)
        self._blocks.update(blocks)
        self._changed.set()
        record = {
            index: [zone, 0.0 if until_s == math.inf else until_s] for index, (zone, until_s) in self._blocks.items()
        }
        with contextlib.suppress(OSError):  # a tmpfs; without it a restarted agent takes them for new, no more
            part = self._path.with_suffix(".part")
            part.write_text(json.dumps(record))
            part.rename(self._path)

    def _read(self) -> dict[int, tuple[Zone, float]]:
        try:
            record = json.loads(self._path.read_text())
            return {
                int(index): ("kernel" if zone == "kernel" else "movable", float(until_s))
                for index, (zone, until_s) in record.items()
            }
        except (OSError, ValueError, TypeError, AttributeError):
            return {}
