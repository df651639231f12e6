"""Folders that come and go, on this machine's own file system."""

from __future__ import annotations

import select
from collections.abc import Iterator
from pathlib import Path

import pytest

from ballast.guest.linux.inotify import Folders


@pytest.fixture
def folders() -> Iterator[Folders]:
    folders = Folders()
    yield folders
    folders.close()


def is_readable(folders: Folders) -> bool:
    return bool(select.select([folders], [], [], 0)[0])


def test_what_is_made_and_removed_is_told_until_it_is_drained(folders: Folders, tmp_path: Path) -> None:
    folders.watch(tmp_path)
    folders.watch(tmp_path)
    assert not is_readable(folders)
    for change in ((tmp_path / "new").mkdir, (tmp_path / "new").rmdir):
        change()
        assert is_readable(folders)
        folders.drain()
        assert not is_readable(folders)


def test_what_happens_deeper_down_or_to_contents_is_not_told(folders: Folders, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    folders.watch(tmp_path)
    (tmp_path / "folder" / "new").mkdir()
    (tmp_path / "file").write_text("else")
    assert not is_readable(folders)


def test_only_folders_that_are_there_can_be_watched(folders: Folders, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        folders.watch(tmp_path / "absent")
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        folders.watch(tmp_path / "file")


def test_a_watched_folder_that_goes_is_no_error(folders: Folders, tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    folders.watch(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    folders.drain()
