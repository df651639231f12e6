"""Hooks of qemu-ga: told in order, undone in reverse, each once, whatever one of them or the writer does."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.guest.writers.hook_session import Guest, Session

FOLDER = "etc/qemu/fsfreeze-hook.d"
STOCK = (
    '#!/bin/sh\nFSFREEZE_D=$(dirname -- "$0")/fsfreeze-hook.d\nfor file in "$FSFREEZE_D"/* ; do "$file" "$@"; done\n'
)


@pytest.fixture
def guest(tmp_path: Path) -> Guest:
    return Guest(tmp_path)


@pytest.fixture
def session(guest: Guest) -> Iterator[Session]:
    with Session(guest, "qemu_hooks:QemuHooks") as session:
        yield session


def test_hooks_freeze_in_order_and_thaw_in_reverse(guest: Guest, session: Session) -> None:
    hooks = [str(guest.hook(f"{FOLDER}/{name}")) for name in ("20-web", "10-db")]
    assert session.ask("identify") == {"level": "front-end", "critical": True, "freeze-ms": 60_000, "thaw-ms": 60_000}
    assert session.ask("prepare") == {}
    assert guest.told == []
    assert session.ask("freeze") == {"detail": {"hooks": hooks[::-1]}}
    assert guest.told == ["10-db freeze", "20-web freeze"]
    assert session.ask("thaw") == {"held": True}
    assert session.ask("post") == {}
    assert guest.told[2:] == ["20-web thaw", "10-db thaw"]


def test_without_a_hook_there_is_nothing_to_do(guest: Guest, session: Session) -> None:
    guest.write("etc/qemu/fsfreeze-hook", STOCK, 0o755)
    assert session.ask("identify") == {"absent": "no hooks"}


@pytest.mark.parametrize(
    "name", ["db~", "db.bak", "db.orig", "db.rpmnew", "db.rpmsave", "db.sample", "db.dpkg-dist", "db.dpkg-new", ".db"]
)
def test_what_was_left_of_a_hook_is_none(guest: Guest, session: Session, name: str) -> None:
    guest.hook(f"{FOLDER}/{name}")
    assert session.ask("identify") == {"absent": "no hooks"}


def test_a_file_that_is_not_executable_is_no_hook(guest: Guest, session: Session) -> None:
    guest.hook(f"{FOLDER}/README", mode=0o644)
    assert session.ask("identify") == {"absent": "no hooks"}


def test_the_stock_dispatcher_gives_way_to_its_folder(guest: Guest, session: Session) -> None:
    guest.write("etc/qemu-ga/fsfreeze-hook", STOCK, 0o755)
    guest.hook("etc/qemu-ga/fsfreeze-hook.d/db")
    session.begin()
    session.ask("freeze")
    assert guest.told == ["db freeze"]


def test_a_dispatcher_of_ones_own_runs_in_place_of_the_folder(guest: Guest, session: Session) -> None:
    guest.hook("etc/qemu/fsfreeze-hook")
    guest.hook(f"{FOLDER}/db")
    session.begin()
    session.ask("freeze")
    assert guest.told == ["fsfreeze-hook freeze"]


def test_a_folder_that_is_two_by_a_link_is_one(guest: Guest, session: Session) -> None:
    guest.hook(f"{FOLDER}/db")
    guest.root.joinpath("etc/qemu-ga").symlink_to("qemu")
    session.begin()
    session.ask("freeze")
    assert guest.told == ["db freeze"]


def test_a_file_without_an_interpreter_line_is_a_script(guest: Guest, session: Session) -> None:
    guest.write(f"{FOLDER}/db", f'echo "plain $1" >>{guest.log}\n', 0o755)
    session.begin()
    assert "error" not in session.ask("freeze")
    assert guest.told == ["plain freeze"]


def test_one_that_fails_ends_the_freeze_and_all_that_were_asked_are_undone(guest: Guest, session: Session) -> None:
    guest.hook(f"{FOLDER}/1")
    failing = guest.hook(f"{FOLDER}/2", '[ "$1" = thaw ] || { echo no such table; echo; exit 3; }')
    guest.hook(f"{FOLDER}/3")
    session.begin()
    assert session.ask("freeze") == {"error": f"{failing} exited 3: no such table", "retryable": False}
    assert session.ask("abort") == {}
    assert guest.told == ["1 freeze", "2 freeze", "2 thaw", "1 thaw"]
    assert "no such table" in session.journal()


def test_an_abort_before_the_freeze_undoes_nothing(guest: Guest, session: Session) -> None:
    guest.hook(f"{FOLDER}/db")
    session.begin()
    assert session.ask("abort") == {}
    assert guest.told == []


def test_a_thaw_that_fails_is_a_freeze_that_may_not_have_held(guest: Guest, session: Session) -> None:
    guest.hook(f"{FOLDER}/1")
    failing = guest.hook(f"{FOLDER}/2", '[ "$1" = freeze ]')
    session.begin()
    session.ask("freeze")
    assert session.ask("thaw") == {"held": False, "reason": f"{failing} exited 1"}
    assert guest.told[2:] == ["2 thaw", "1 thaw"]


def test_a_hook_that_hangs_is_killed_at_the_deadline(guest: Guest, session: Session) -> None:
    hanging = guest.hook(f"{FOLDER}/db", f'[ "$1" = thaw ] || {{ echo $$ >{guest.log}.pid; sleep 1000; }}')
    session.begin()
    answer = session.ask("freeze", deadline_s=3)
    assert answer["error"].startswith(f"{hanging} did not end within ")
    pid = int(Path(f"{guest.log}.pid").read_text())
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert session.ask("abort") == {}
    assert guest.told == ["db freeze", "db thaw"]


def test_a_thaw_that_hangs_leaves_time_for_the_others(guest: Guest, session: Session) -> None:
    guest.hook(f"{FOLDER}/1")
    guest.hook(f"{FOLDER}/2", '[ "$1" = freeze ] || sleep 1000')
    session.begin()
    session.ask("freeze")
    assert session.ask("thaw", deadline_s=6)["held"] is False
    assert guest.told[2:] == ["2 thaw", "1 thaw"]


def test_a_child_that_keeps_the_output_open_is_not_waited_for(guest: Guest, session: Session) -> None:
    guest.hook(f"{FOLDER}/db", f'[ "$1" = thaw ] || {{ sleep 1000 & echo $! >{guest.log}.pid; }}')
    session.begin()
    assert "error" not in session.ask("freeze")
    pid = int(Path(f"{guest.log}.pid").read_text())
    try:
        assert session.ask("thaw") == {"held": True}
    finally:
        os.kill(pid, signal.SIGKILL)  # and it was alive


def test_a_hook_may_print_without_end(guest: Guest, session: Session) -> None:
    guest.hook(f"{FOLDER}/db", "head -c 3000000 /dev/zero | tr '\\0' x")
    session.begin()
    assert "error" not in session.ask("freeze")
    assert 1 << 15 < len(session.journal()) < 1 << 17


def test_hooks_see_nothing_of_the_writers_own(guest: Guest, session: Session) -> None:
    guest.hook(f"{FOLDER}/db", 'read line; [ -z "$line" ] && [ -z "$RUNTIME_DIRECTORY" ] && echo fine >/dev/stderr')
    session.begin()
    assert "error" not in session.ask("freeze")
    assert "fine" in session.journal()


def test_where_systemd_makes_no_scope_hooks_run_without(guest: Guest, session: Session) -> None:
    guest.root.joinpath("run/systemd/system").mkdir(parents=True)
    guest.hook(f"{FOLDER}/db")
    with Session(guest, "qemu_hooks:QemuHooks") as session:
        session.begin()
        assert "error" not in session.ask("freeze")
        assert session.ask("thaw") == {"held": True}
    assert guest.told == ["db freeze", "db thaw"]


@pytest.mark.parametrize("place", [f"{FOLDER}/db", FOLDER, "etc"])
@pytest.mark.parametrize("mode", [0o775, 0o757])
def test_what_others_may_write_is_refused_by_name(guest: Guest, session: Session, place: str, mode: int) -> None:
    hook = guest.hook(f"{FOLDER}/db")
    guest.root.joinpath(place).chmod(mode)
    session.ask("identify")
    reason = f"{hook} is not used: others than root may write {guest.root / place}"
    assert session.ask("prepare") == {"error": reason, "retryable": False}


def test_a_writer_killed_in_a_freeze_is_undone_by_the_next(guest: Guest, session: Session) -> None:
    guest.hook(f"{FOLDER}/1")
    os.mkfifo(f"{guest.log}.fifo")
    guest.hook(f"{FOLDER}/2", f'[ "$1" = thaw ] || {{ read x <{guest.log}.fifo; echo 2 frozen >>{guest.log}; }}')
    guest.hook(f"{FOLDER}/3")
    session.begin()
    session.send("freeze")
    fifo = os.open(f"{guest.log}.fifo", os.O_WRONLY)  # once the hook reads it
    session.kill()
    with Session(guest, "qemu_hooks:QemuHooks") as heir:
        heir.send("abort")
        os.write(fifo, b"go on\n")
        os.close(fifo)
        assert heir.hear() == {}
    assert guest.told == ["1 freeze", "2 freeze", "2 frozen", "2 thaw", "1 thaw"]


def test_a_writer_killed_in_a_thaw_leaves_the_rest_of_it_to_the_next(guest: Guest, session: Session) -> None:
    guest.hook(f"{FOLDER}/1")
    os.mkfifo(f"{guest.log}.fifo")
    guest.hook(f"{FOLDER}/2", f'[ "$1" = freeze ] || read x <{guest.log}.fifo')
    guest.hook(f"{FOLDER}/3")
    session.begin()
    session.ask("freeze")
    session.send("thaw")
    fifo = os.open(f"{guest.log}.fifo", os.O_WRONLY)
    session.kill()
    with Session(guest, "qemu_hooks:QemuHooks") as heir:
        heir.send("abort")
        os.write(fifo, b"go on\n")
        os.close(fifo)
        assert heir.hear() == {}
        assert heir.ask("abort") == {}
    assert guest.told[3:] == ["3 thaw", "2 thaw", "1 thaw"]
