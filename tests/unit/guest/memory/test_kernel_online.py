"""The kernel's own policy in a folder: set, and put back as it was found, whoever comes next."""

from __future__ import annotations

from pathlib import Path

import pytest

from ballast.guest.linux.memory_hotplug import AUTO_ONLINE, MOVABLE_PERCENT, POLICY
from ballast.guest.linux.tree import Tree
from ballast.guest.memory.decisions import Decisions
from ballast.guest.memory.kernel_online import arrange, take_back
from tests.unit.guest.conftest import MakeTree

FOUND = {AUTO_ONLINE: "offline", POLICY: "contig-zones", MOVABLE_PERCENT: "301"}
OURS = {AUTO_ONLINE: "online", POLICY: "auto-movable", MOVABLE_PERCENT: "300"}


def read(tree: Tree) -> dict[str, str]:
    return {name: tree.read(name) for name in FOUND}


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    return tmp_path / "online-policy.json"


def test_it_is_set_kept_over_restarts_and_put_back(make_tree: MakeTree, mark: Path) -> None:
    tree, decisions = make_tree(FOUND), Decisions()
    for _ in range(2):  # the second is an agent that comes after one that was killed
        arrange(tree, decisions, is_wanted=True, mark=mark)
        assert read(tree) == OURS
    for _ in range(2):
        arrange(tree, decisions, is_wanted=False, mark=mark)
        assert read(tree) == FOUND
    assert [one.change for one in decisions.last()] == ["policy-set", "policy-set", "policy-restored"]
    assert take_back(mark) is False


def test_a_kernel_without_the_policy_has_all_of_it_movable(make_tree: MakeTree, mark: Path) -> None:
    tree = make_tree({AUTO_ONLINE: "offline"})
    arrange(tree, Decisions(), is_wanted=True, mark=mark)
    assert tree.read(AUTO_ONLINE) == "online_movable"
    assert take_back(mark) is True
    assert tree.read(AUTO_ONLINE) == "offline"


def test_without_memory_hotplug_it_says_so(make_tree: MakeTree, mark: Path, caplog: pytest.LogCaptureFixture) -> None:
    decisions = Decisions()
    arrange(make_tree({}), decisions, is_wanted=True, mark=mark)
    assert "this kernel cannot bring hot-added memory online itself" in caplog.text
    assert (decisions.last(), mark.exists()) == ([], False)


def test_what_cannot_be_set_whole_is_left_as_it_was(
    make_tree: MakeTree, mark: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tree = make_tree(FOUND)
    tree.path(AUTO_ONLINE).unlink()
    tree.path(AUTO_ONLINE).symlink_to("/proc/version")
    arrange(tree, Decisions(), is_wanted=True, mark=mark)
    assert "failed to write" in caplog.text
    assert [tree.read(name) for name in (POLICY, MOVABLE_PERCENT)] == ["contig-zones", "301"]
    assert not mark.exists()
