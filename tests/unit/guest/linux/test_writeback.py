"""How much is dirty, and how much may be for a moment."""

from __future__ import annotations

from pathlib import Path

import pytest

from ballast.guest.linux.tree import Tree
from ballast.guest.linux.writeback import limit_dirty, read_dirty_bytes, restore


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


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    folder = tmp_path / "proc/sys/vm"
    folder.mkdir(parents=True)
    for kind in ("dirty", "dirty_background"):
        (folder / f"{kind}_bytes").write_text("0\n")
        (folder / f"{kind}_ratio").write_text("20\n")
    return Tree(tmp_path)


def test_limits_are_lowered_and_put_back_in_the_unit_that_they_had(tree: Tree, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    limit_dirty(tree, mark)
    assert tree.read("proc/sys/vm/dirty_bytes") == "16777216"
    assert tree.read("proc/sys/vm/dirty_background_bytes") == "2097152"
    for kind in ("dirty", "dirty_background"):
        tree.write(f"proc/sys/vm/{kind}_ratio", "0")  # as the kernel does when bytes are written
    restore(mark)
    assert tree.read("proc/sys/vm/dirty_ratio") == tree.read("proc/sys/vm/dirty_background_ratio") == "20"
    assert not mark.exists()


def test_limits_that_are_low_enough_stay(tree: Tree, tmp_path: Path) -> None:
    tree.write("proc/sys/vm/dirty_bytes", "8388608\n")
    limit_dirty(tree, tmp_path / "mark")
    assert tree.read("proc/sys/vm/dirty_bytes") == "8388608"
    assert not (tmp_path / "mark").exists()
