"""Kernel files under a root."""

from __future__ import annotations

from pathlib import Path

import pytest

from ballast.guest.linux.tree import Tree


def test_reads_without_the_newline_and_writes_what_it_is_told(tmp_path: Path) -> None:
    tree = Tree(tmp_path)
    (tmp_path / "sys").mkdir()
    (tmp_path / "sys/state").write_text("offline\n")
    assert tree.read("sys/state") == tree.read("/sys/state") == "offline"
    tree.write("sys/state", "online")
    assert (tmp_path / "sys/state").read_text() == "online"


def test_bytes_that_are_no_utf8_come_through(tmp_path: Path) -> None:
    (tmp_path / "mounts").write_bytes(b"/x\xe9\n")
    assert Tree(tmp_path).read("mounts") == "/x\udce9"


def test_errors_name_the_path(tmp_path: Path) -> None:
    tree = Tree(tmp_path)
    with pytest.raises(FileNotFoundError, match=str(tmp_path / "proc/none")):
        tree.read("proc/none")
    with pytest.raises(FileNotFoundError, match=str(tmp_path / "proc/none")):
        tree.write("proc/none", "x")


def test_names_are_sorted_and_an_absent_folder_has_none(tmp_path: Path) -> None:
    for name in ("memory1", "block_size_bytes", "memory0"):
        (tmp_path / name).touch()
    tree = Tree(tmp_path)
    assert tree.names("/") == ["block_size_bytes", "memory0", "memory1"]
    assert tree.names("sys") == []
    assert tree.exists("memory0")
    assert not tree.exists("memory2")
