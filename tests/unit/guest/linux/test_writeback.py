"""How much is dirty."""

from __future__ import annotations

from pathlib import Path

import pytest

from ballast.guest.linux.tree import Tree
from ballast.guest.linux.writeback import read_dirty_bytes


@pytest.mark.parametrize(
    ("text", "dirty_bytes"),
    [
        ("Dirty:              6412 kB\nWriteback:             8 kB\n", 6420 << 10),
        ("MemFree: 1 kB\nDirty: 0 kB\nWriteback: 0 kB\nWritebackTmp: 7 kB\n", 0),
        ("", 0),
    ],
)
def test_what_is_dirty_and_what_is_being_written_are_added_up(tmp_path: Path, text: str, dirty_bytes: int) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text(text)
    assert read_dirty_bytes(Tree(tmp_path)) == dirty_bytes
