"""What a person sees of a guest's memory."""

from __future__ import annotations

import dataclasses

import pytest

from ballast.host.view import memory_table
from ballast.wire.memory_names import LevelSource, LruLists, MemoryStatus
from ballast.wire.shape import read_record
from tests.unit.host.fake import MEMORY

STATUS = read_record(MemoryStatus, MEMORY)


def rows(status: MemoryStatus) -> dict[str, str]:
    return {row[0]: row[1] for row in memory_table(status).rows}


@pytest.mark.parametrize(
    ("source", "text"),
    [
        (None, "low"),
        ("slices", "low"),
        ("system", "low (by system-wide stalls, the agent's own among them)"),
        ("vmstat", "low (an estimate: the kernel has no PSI)"),
        ("of-later", "low"),
    ],
)
def test_where_a_level_comes_from_is_told_where_it_is_not_the_best(source: LevelSource | None, text: str) -> None:
    assert rows(dataclasses.replace(STATUS, level_source=source))["level"] == text


def test_active_and_inactive_memory_is_told_where_the_guest_tells() -> None:
    assert not {"active", "inactive"} & rows(STATUS).keys()
    told = rows(dataclasses.replace(STATUS, lru=LruLists(1 << 20, 2 << 20, 3 << 20, 4 << 20)))
    assert told["active"] == "4 MiB (1 MiB of programs, 3 MiB of files)"
    assert told["inactive"] == "6 MiB (2 MiB of programs, 4 MiB of files)"
