"""The judgement of the crash-consistency campaign: what it complains of, and what its figures say."""

from __future__ import annotations

from typing import Any

import pytest

from ballast.wire.names import FilesystemResult, QuiesceBegun, QuiesceEnded
from tests.vm.crash import judge, summary
from tests.vm.crash_loaded import Snapshot

ACKNOWLEDGED = {"file-data0": 7, "postgresql-0": 41}
CLEAN = {"before": 4, "after": 0, "said": "", "deleted": False, "torn": []}
LAST = {"file-data0": 7, "postgresql-0": 42}


def _snapshot(state: Any = "frozen", *, held: bool = True) -> Snapshot:
    filesystem = FilesystemResult("/mnt/data0", "253:16", "ext4", state)
    began = QuiesceBegun("id", "application", 60_000, 1.0, 1.0, [filesystem])
    return Snapshot({"data0": ("image", "raw")}, ACKNOWLEDGED, began, QuiesceEnded(held, 1.0, 1.0))  # type: ignore[dict-item]


def test_what_is_all_there_and_clean_is_not_complained_of() -> None:
    assert judge(_snapshot(), {"data0": CLEAN | {"last": LAST}}) == []


@pytest.mark.parametrize(
    ("found", "complaint"),
    [
        ({"last": LAST | {"postgresql-0": 40}}, "postgresql-0: 1 lost, 40 of 41 are there"),
        ({"last": {"file-data0": 7}}, "postgresql-0: 42 lost, -1 of 41 are there"),
        ({"last": LAST, "after": 1, "said": "orphan"}, "data0: not clean: orphan"),
        ({"last": LAST, "deleted": True}, "data0: the deleted file is back"),
        ({"last": LAST, "torn": ["postgresql-0"]}, "postgresql-0: not all before its last write is there"),
        ({"last": LAST, "failed": "no mount"}, "data0: no mount"),
    ],
)
def test_what_is_missing_or_unclean_is_named(found: dict[str, Any], complaint: str) -> None:
    assert judge(_snapshot(), {"data0": CLEAN | found}) == [complaint]


@pytest.mark.parametrize(
    ("snapshot", "complaint"),
    [
        (_snapshot("skipped"), "data0: skipped"),
        (_snapshot(held=False), "it did not hold: None"),
    ],
)
def test_a_freeze_that_was_none_is_named(snapshot: Snapshot, complaint: str) -> None:
    assert judge(snapshot, {"data0": CLEAN | {"last": LAST}}) == [complaint]


def test_figures_count_transactions_and_what_was_lost() -> None:
    fine = {"cycle": 0, "seed": 1, "acknowledged": ACKNOWLEDGED, "complaints": [], "consistency": "application"}
    bad = fine | {"cycle": 1, "complaints": ["postgresql-0: 1 lost, 40 of 41 are there"]}
    assert summary([fine, bad]).splitlines() == [
        "cycle 1 of seed 1: postgresql-0: 1 lost, 40 of 41 are there",
        "2 cycles, 1 failed; 82 acknowledged transactions looked for in 6 file systems: 1 writers lost any, "
        "0 file systems unclean; 2 snapshots with both servers' consent",
    ]
