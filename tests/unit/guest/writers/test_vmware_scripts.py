"""Scripts of open-vm-tools: the older pair around the folder, and freezeFail for a freeze that failed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.guest.writers.hook_session import Guest, Session

FOLDER = "etc/vmware-tools/backupScripts.d"


@pytest.fixture
def guest(tmp_path: Path) -> Guest:
    return Guest(tmp_path)


@pytest.fixture
def session(guest: Guest) -> Iterator[Session]:
    with Session(guest, "vmware_scripts:VmwareScripts") as session:
        yield session


def test_scripts_run_in_order_the_older_pair_around_them(guest: Guest, session: Session) -> None:
    for path in (f"{FOLDER}/10-db", f"{FOLDER}/20-web", "usr/sbin/pre-freeze-script", "usr/sbin/post-thaw-script"):
        guest.hook(path)
    guest.hook(f"{FOLDER}/folder/nested")
    session.begin()
    session.ask("freeze")
    assert session.ask("thaw") == {"held": True}
    assert guest.told == [
        "pre-freeze-script freeze",
        "10-db freeze",
        "20-web freeze",
        "20-web thaw",
        "10-db thaw",
        "post-thaw-script thaw",
    ]


def test_a_freeze_that_failed_is_told_to_all_that_were_asked(guest: Guest, session: Session) -> None:
    guest.hook("usr/sbin/post-thaw-script")
    guest.hook(f"{FOLDER}/1")
    guest.hook(f"{FOLDER}/2", '[ "$1" != freeze ]')
    guest.hook(f"{FOLDER}/3")
    session.begin()
    assert "2 exited 1" in session.ask("freeze")["error"]
    assert session.ask("abort") == {}
    assert guest.told == ["1 freeze", "2 freeze", "2 freezeFail", "1 freezeFail", "post-thaw-script freezeFail"]


def test_the_script_before_may_have_none_after(guest: Guest, session: Session) -> None:
    guest.hook("usr/sbin/pre-freeze-script")
    session.begin()
    session.ask("freeze")
    assert session.ask("thaw") == {"held": True}
    assert guest.told == ["pre-freeze-script freeze"]


def test_a_script_that_is_not_executable_stops_the_backup(guest: Guest, session: Session) -> None:
    script = guest.hook(f"{FOLDER}/db", mode=0o644)
    assert session.ask("identify")["critical"] is True
    assert session.ask("prepare") == {"error": f"{script} is not executable", "retryable": False}


def test_without_a_script_there_is_nothing_to_do(guest: Guest, session: Session) -> None:
    guest.hook(f"{FOLDER}/db.rpmsave")
    assert session.ask("identify") == {"absent": "no hooks"}
