"""The writers of PostgreSQL and MariaDB, without one. tests/vm/test_server_writers.py has real ones."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ballast.guest.writers.mariadb import MariaDB, mariadb
from ballast.guest.writers.postgresql import PostgreSQL, find_clusters, psql
from ballast.guest.writers.program import AbsentError, Request, WriterError

# A client program that repeats its statements into a file and answers some, as the real one does with these options.
FAKE_CLIENT = """\
#!/bin/sh
while read -r statement; do
    echo "$statement" >>"$SAID"
    case $statement in
    *VERSION*) echo "$VERSION" ;;
    *gtid*) echo 0-1-7 ;;
    *MASTER*) printf 'mariadb-bin.000003\\t344\\t\\t\\n' ;;
    *"$FAILS"*)
        printf -- '--------------\\n%s\\n--------------\\n\\nERROR 1205 (HY000): Too late\\n' "$statement" >&2
        exit 1 ;;
    *ballast-end*) echo ballast-end ;;
    esac
done
"""


def request(verb: str, **config: Any) -> Request:
    return Request({"verb": verb, "deadline-ms": 10_000, "config": config})


@pytest.fixture
def said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the client program has been told, a statement a line."""
    client = tmp_path / "mariadb"
    client.write_text(FAKE_CLIENT)
    client.chmod(0o755)
    said = tmp_path / "said"
    said.touch()
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    for name, value in {"SAID": str(said), "VERSION": "11.8.6-MariaDB", "FAILS": "nothing"}.items():
        monkeypatch.setenv(name, value)
    return said


@pytest.fixture
def writer(said: Path) -> Iterator[MariaDB]:
    writer = MariaDB()
    yield writer
    writer.abort(request("abort"))


def stages(said: Path) -> list[str]:
    words = [line.rstrip(";").split(" STAGE ") for line in said.read_text().splitlines()]
    return [word[1] for word in words if len(word) == 2]


def test_the_stages_come_in_their_order(said: Path, writer: MariaDB) -> None:
    assert writer.identify(request("identify")) == {}
    writer.prepare(request("prepare"))
    assert stages(said) == ["START", "FLUSH"]
    detail = writer.freeze(request("freeze"))["detail"]
    assert detail == {"gtid": "0-1-7", "binlog-file": "mariadb-bin.000003", "binlog-position": 344}
    assert stages(said) == ["START", "FLUSH", "BLOCK_DDL", "BLOCK_COMMIT"]
    assert writer.thaw(request("thaw")) == {"held": True}
    assert stages(said)[4:] == ["END"]


def test_nothing_waits_longer_for_a_lock_than_the_agent_for_us(said: Path, writer: MariaDB) -> None:
    writer.identify(request("identify"))
    writer.prepare(request("prepare"))
    bounds_s = re.findall(r"lock_wait_timeout = (\d+);BACKUP STAGE", said.read_text())
    assert [int(bound_s) <= 9 for bound_s in bounds_s] == [True, True]


def test_a_stage_that_does_not_come_is_an_error_without_the_statement(
    said: Path, writer: MariaDB, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAILS", "BLOCK_COMMIT")
    writer.identify(request("identify"))
    writer.prepare(request("prepare"))
    with pytest.raises(WriterError, match=r"^ERROR 1205 \(HY000\): Too late$"):
        writer.freeze(request("freeze"))
    assert writer.abort(request("abort")) == {}
    assert "END" not in stages(said)  # the session is over, and its locks with it


def test_a_session_lost_while_frozen_is_told(writer: MariaDB, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAILS", "STAGE END")
    for verb in ("identify", "prepare", "freeze"):
        getattr(writer, verb)(request(verb))
    assert writer.thaw(request("thaw")) == {"held": False, "reason": "ERROR 1205 (HY000): Too late"}


def test_abort_without_anything_before_it_does_nothing(said: Path) -> None:
    assert MariaDB().abort(request("abort")) == {}
    assert PostgreSQL().abort(request("abort")) == {}
    assert said.read_text() == ""


def test_mysql_is_absent(writer: MariaDB, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VERSION", "8.0.36")
    with pytest.raises(AbsentError, match=r"MySQL 8\.0\.36 has no BACKUP STAGE"):
        writer.identify(request("identify"))


def test_how_mariadb_is_reached_is_configured() -> None:
    assert mariadb(request("identify"))[:2] == ["mariadb", "--batch"]
    configured = mariadb(request("identify", **{"defaults-file": "/etc/ballast/mariadb.cnf", "socket": "/run/m.sock"}))
    assert configured[1] == "--defaults-file=/etc/ballast/mariadb.cnf"
    assert configured[-1] == "--socket=/run/m.sock"


def test_clusters_are_the_sockets_that_somebody_listens_on(tmp_path: Path) -> None:
    looked_for = request("identify", sockets=[f"{tmp_path}/.s.PGSQL.*"])
    (tmp_path / ".s.PGSQL.5432.lock").touch()
    with socket.socket(socket.AF_UNIX) as first, socket.socket(socket.AF_UNIX) as second:
        first.bind(str(tmp_path / ".s.PGSQL.5432"))
        second.bind(str(tmp_path / ".s.PGSQL.5433"))
        first.listen()
        second.listen()
        second.close()  # as a server that was killed
        assert find_clusters(looked_for) == [str(tmp_path / ".s.PGSQL.5432")]
        assert PostgreSQL().identify(looked_for)["user"] == "postgres"
    with pytest.raises(AbsentError, match="no cluster is running"):
        PostgreSQL().identify(looked_for)
    with pytest.raises(WriterError, match="no cluster is running any more"):
        PostgreSQL().prepare(looked_for)


def test_psql_is_told_folder_port_and_database() -> None:
    command = psql("/run/postgresql/.s.PGSQL.5433", request("prepare"))
    assert command[0].endswith("psql")
    assert command[-3:] == ["--host=/run/postgresql", "--port=5433", "--dbname=postgres"]
    assert psql("/x/.s.PGSQL.1", request("prepare", database="shop"))[-1] == "--dbname=shop"
