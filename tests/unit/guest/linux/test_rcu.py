"""The switch is turned back by whoever finds the mark, and by nobody else."""

from __future__ import annotations

from pathlib import Path

import pytest

from ballast.guest.linux import rcu


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    return tmp_path / "mark"


@pytest.fixture
def switch(tmp_path: Path) -> Path:
    path = tmp_path / "rcu_expedited"
    path.write_text("0\n")
    return path


def test_it_is_on_until_it_is_restored(switch: Path, mark: Path) -> None:
    rcu.restore(mark)
    assert switch.read_text() == "0\n"
    rcu.expedite(switch, mark)
    assert switch.read_text() == "1"
    rcu.expedite(switch, mark)
    rcu.restore(mark)
    assert (switch.read_text(), mark.exists()) == ("0", False)


def test_what_an_administrator_has_turned_on_stays_on(switch: Path, mark: Path) -> None:
    switch.write_text("1\n")
    rcu.expedite(switch, mark)
    rcu.restore(mark)
    assert switch.read_text() == "1\n"


def test_without_a_place_for_the_mark_or_a_switch_nothing_is_turned(switch: Path, mark: Path, tmp_path: Path) -> None:
    rcu.expedite(switch, tmp_path / "absent/mark")
    assert switch.read_text() == "0\n"
    rcu.expedite(tmp_path / "absent", mark)
    rcu.restore(mark)
    assert not mark.exists()
