"""What the whole system's settings were is put back by whoever finds the mark."""

from __future__ import annotations

from pathlib import Path

import pytest

from ballast.guest.linux import settings


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    return tmp_path / "mark"


@pytest.fixture
def knob(tmp_path: Path) -> Path:
    path = tmp_path / "knob"
    path.write_text("1\n")
    return path


def test_what_a_mark_tells_of_is_put_back_before_the_next_change(knob: Path, mark: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_text("5")
    settings.change(mark, {knob: "2"}, {knob: "1"})
    settings.change(mark, {other: "6"}, {other: "5"})
    assert (knob.read_text(), other.read_text()) == ("1", "6")
    settings.restore(mark)
    settings.restore(mark)
    assert (knob.read_text(), other.read_text(), mark.exists()) == ("1", "5", False)


def test_what_cannot_be_put_back_does_not_keep_the_rest(knob: Path, mark: Path, tmp_path: Path) -> None:
    settings.change(mark, {knob: "2"}, {tmp_path / "absent/knob": "1", knob: "1"})
    settings.restore(mark)
    assert (knob.read_text(), mark.exists()) == ("1", False)


def test_what_was_changed_before_one_could_not_be_is_put_back(knob: Path, mark: Path, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="absent"):
        settings.change(mark, {knob: "2", tmp_path / "absent/knob": "2"}, {knob: "1"})
    settings.restore(mark)
    assert knob.read_text() == "1"


@pytest.mark.parametrize("text", ["", '{"half'])
def test_a_mark_that_was_being_written_changes_nothing(knob: Path, mark: Path, text: str) -> None:
    mark.write_text(text)
    settings.restore(mark)
    assert (knob.read_text(), mark.exists()) == ("1\n", False)
