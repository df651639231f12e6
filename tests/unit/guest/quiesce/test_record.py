"""The record in /run: what cannot be read, what comes back, and which process it names."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from ballast.guest.quiesce.record import ANSWERS_KEPT_S, Open, Record, process_start, read_record, write_record

OPEN = Open("a", 42, "12345", [{"mountpoints": ["/srv", "/x\udce9"], "device": "8:1"}])


@pytest.mark.parametrize(
    "text",
    ["", "garbage", "5", "[]", "null", "{}", '{"open": null}', '{"open": {"id": "a"}, "answers": {}}', '{"open": 5}'],
)
def test_what_is_no_record_is_a_value_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "quiesce.json"
    path.write_text(text)
    with pytest.raises(ValueError):  # noqa: PT011 - some texts are json's
        read_record(path)


def test_no_file_is_an_empty_record(tmp_path: Path) -> None:
    assert read_record(tmp_path / "none") == Record()


@pytest.mark.parametrize("opened", [None, OPEN])
def test_what_is_written_comes_back(tmp_path: Path, opened: Open | None) -> None:
    path = tmp_path / "quiesce.json"
    record = Record(opened)
    record.remember("b", {"held": True}, now_s=5.0, unreported=True)
    for _ in range(2):
        write_record(path, record)
        assert read_record(path) == record
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [entry.name for entry in tmp_path.iterdir()] == ["quiesce.json"]


def test_answers_are_kept_for_an_hour() -> None:
    record = Record()
    for number in range(3):
        record.remember(str(number), {}, now_s=number * ANSWERS_KEPT_S / 2, unreported=False)
    assert list(record.answers) == ["1", "2"]


def test_of_many_answers_the_latest_are_kept() -> None:
    record = Record()
    for number in range(1000):
        record.remember(str(number), {}, now_s=0.0, unreported=False)
    assert len(record.answers) == 64
    assert list(record.answers)[-1] == "999"


def test_a_process_is_known_by_its_start_until_it_is_gone() -> None:
    own = process_start(os.getpid())
    assert own == process_start(os.getpid())
    assert int(own) > 0
    with subprocess.Popen(["/bin/cat"], stdin=subprocess.PIPE) as process:
        assert int(process_start(process.pid)) >= int(own)
    with pytest.raises(ProcessLookupError):
        process_start(process.pid)


def test_a_zombie_is_gone() -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    with pytest.raises(ProcessLookupError):
        process_start(process.pid)
    process.wait()


def test_a_name_with_brackets_and_blanks_does_not_shift_the_fields(tmp_path: Path) -> None:
    program = tmp_path / "a) Z 1"
    program.symlink_to("/bin/cat")
    with subprocess.Popen([program], stdin=subprocess.PIPE) as process:
        plain = process_start(process.pid)
        assert int(plain) >= int(process_start(os.getpid()))
