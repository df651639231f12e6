"""How much is dirty, and how much may be for a moment."""

from __future__ import annotations

from pathlib import Path

import pytest

from ballast.guest.linux.tree import Tree
from ballast.guest.linux.writeback import DirtyLimit, read_dirty_bytes


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
    (tmp_path / "proc/vmstat").write_text("nr_dirty_threshold 25600\nnr_dirty_background_threshold 12800\n")
    make_dirty(Tree(tmp_path), 40960)
    return Tree(tmp_path)


@pytest.fixture
def limit(tree: Tree, tmp_path: Path) -> DirtyLimit:
    return DirtyLimit(tree, tmp_path / "mark")


def make_dirty(tree: Tree, kib: int) -> None:
    tree.write("proc/meminfo", f"MemTotal: 1000000 kB\nDirty: {kib} kB\nWriteback: 0 kB\n")


def limits(tree: Tree) -> tuple[int, int]:
    return (int(tree.read("proc/sys/vm/dirty_bytes")), int(tree.read("proc/sys/vm/dirty_background_bytes")))


def test_it_follows_what_is_dirty_down_to_the_least_and_not_up_again(tree: Tree, limit: DirtyLimit) -> None:
    limit.follow()
    assert limits(tree) == (60 << 20, 60 << 17)
    make_dirty(tree, 20480)
    limit.follow()
    assert limits(tree) == (30 << 20, 30 << 17)
    make_dirty(tree, 40960)
    limit.follow()
    assert limits(tree) == (30 << 20, 30 << 17)
    make_dirty(tree, 0)
    limit.follow()
    assert limits(tree) == (4 << 20, 1 << 19)
    limit.loosen()
    assert limits(tree) == (32 << 20, 4 << 20)


def test_it_is_put_back_in_the_unit_that_it_had(tree: Tree, limit: DirtyLimit, tmp_path: Path) -> None:
    limit.follow()
    for kind in ("dirty", "dirty_background"):
        tree.write(f"proc/sys/vm/{kind}_ratio", "0")  # as the kernel does when bytes are written
    DirtyLimit(tree, tmp_path / "mark").restore()
    assert tree.read("proc/sys/vm/dirty_ratio") == tree.read("proc/sys/vm/dirty_background_ratio") == "20"
    assert not (tmp_path / "mark").exists()


def test_what_is_as_low_already_stays(tree: Tree, limit: DirtyLimit, tmp_path: Path) -> None:
    tree.write("proc/vmstat", "nr_dirty_threshold 1024\n")
    make_dirty(tree, 1024)
    limit.follow()
    limit.loosen()
    assert limits(tree) == (0, 0)
    assert not (tmp_path / "mark").exists()


def test_without_a_place_for_the_mark_nothing_is_changed(tree: Tree, tmp_path: Path) -> None:
    limit = DirtyLimit(tree, tmp_path / "absent/mark")
    for _ in range(2):
        limit.follow()
        limit.loosen()
    assert limits(tree) == (0, 0)


def test_what_was_not_lowered_is_not_loosened(tree: Tree, limit: DirtyLimit) -> None:
    limit.loosen()
    assert limits(tree) == (0, 0)
