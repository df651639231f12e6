"""Page cache that is driven out, in a folder: never more than asked for, and not where it would hurt."""

from __future__ import annotations

import pytest

from ballast.guest.linux.tree import Tree
from ballast.guest.memory.trim import RECLAIM, trim
from tests.unit.guest.conftest import MakeTree

CALM = {
    "proc/pressure/memory": "some avg10=0.00 avg60=0 avg300=0 total=0\nfull avg10=0 avg60=0 avg300=0 total=0",
    "proc/vmstat": "workingset_refault_anon 0\nworkingset_refault_file 7",
    RECLAIM: "",
}


def refuse(tree: Tree) -> None:
    """A file that nobody can write to, not even root."""
    tree.path(RECLAIM).unlink()
    tree.path(RECLAIM).symlink_to("/proc/version")


@pytest.mark.parametrize(
    ("wanted_mib", "last"),
    [(1, "1048576 swappiness=0"), (16, "16777216 swappiness=0"), (17, "1048576 swappiness=0"), (0, "")],
)
def test_it_is_asked_for_in_pieces(make_tree: MakeTree, wanted_mib: int, last: str) -> None:
    tree = make_tree(CALM)
    assert trim(tree, wanted_mib << 20) == wanted_mib << 20
    assert tree.read(RECLAIM) == last


def test_when_the_time_is_over_nothing_is_done(make_tree: MakeTree) -> None:
    assert trim(make_tree(CALM), 1 << 20, timeout_s=-1.0) == 0


def test_what_the_kernel_refuses_is_no_error(make_tree: MakeTree) -> None:
    tree = make_tree(CALM)
    refuse(tree)
    assert trim(tree, 1 << 20) == 0


@pytest.mark.parametrize("missing", ["proc/pressure/memory", "proc/vmstat"])
def test_what_cannot_be_watched_is_not_begun(make_tree: MakeTree, missing: str) -> None:
    tree = make_tree({name: text for name, text in CALM.items() if name != missing})
    assert (trim(tree, 1 << 20), tree.read(RECLAIM)) == (0, "")
