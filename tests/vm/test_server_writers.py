"""The writers that ship for PostgreSQL, MariaDB and Valkey, with these servers, through the whole agent."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import AsyncIterator, Callable, Iterator

import pytest

from ballast.host.agent import Agent
from ballast.wire.names import QuiesceBegun, WriterResult
from tests.lab.guest import Guest
from tests.lab.image import SERVER_UNITS
from tests.vm.unit import configured

UNITS = " ".join(SERVER_UNITS)
NAMES = ("mariadb", "postgresql", "redis")
LEASE_MS = 60_000
# None of the servers has its files there: what of them stands still is the writers' doing.
ELSEWHERE = ["/mnt/data0"]

BINLOG = "/etc/mysql/mariadb.conf.d/98-binlog.cnf"

READY = """
until runuser -u postgres -- psql -Xqc '' postgres; do sleep 0.5; done 2>/dev/null
until mariadb -e ''; do sleep 0.5; done 2>/dev/null
until valkey-cli ping | grep -q PONG; do sleep 0.5; done 2>/dev/null
"""
FILL = """
mariadb -e 'create or replace database lab; create table lab.t(a int primary key) engine=innodb'
valkey-cli set lab filled >/dev/null
"""
INSERT = "setsid mariadb -e 'insert into lab.t values(1)' </dev/null &>/run/lab-insert.said &"
WAIT_HELD_BACK = """
until mariadb -Ne "select state from information_schema.processlist where info like 'insert%'" | grep -i backup
do sleep 0.2; done
"""
WAIT_INSERTED = "until mariadb -Ne 'select count(*) from lab.t' | grep -qx 1; do sleep 0.2; done"
# A front end is told to freeze before any back end, and after all have prepared.
KILLER = "/etc/ballast/writers.d/killer"
KILL_AT_FREEZE = f"""#!/bin/sh
while read -r request; do
    case $request in
    *'"verb": "identify"'*) echo '{{"level": "front-end", "freeze-ms": 30000}}' ;;
    *'"verb": "freeze"'*) systemctl kill --signal=KILL {UNITS}; echo '{{}}' ;;
    *) echo '{{}}' ;;
    esac
done
"""
IMPATIENT = "[writer.postgresql]\nprepare-ms = 3000\n"


@pytest.fixture(scope="module")
def servers(guest: Guest) -> Iterator[None]:
    """All three running, with something in them."""
    guest.put(BINLOG, b"[mariadbd]\nlog_bin\n")
    _start(guest)
    guest.run(FILL, timeout_s=60)
    yield
    guest.run(f"systemctl stop {UNITS}; systemctl reset-failed {UNITS} || true", timeout_s=120)
    guest.run(["rm", "-f", BINLOG, "/run/lab-insert.said"])


@pytest.fixture
async def agent(vsock: str, token: str) -> AsyncIterator[Agent]:
    async with Agent.connect(vsock, token=token) as connected:
        yield connected


def _start(guest: Guest) -> None:
    guest.run(f"systemctl reset-failed {UNITS} || true; systemctl start {UNITS}{READY}", timeout_s=240)


def _of_servers(results: list[WriterResult]) -> list[WriterResult]:
    return [one for one in results if one.name in NAMES]


def _states(begun: QuiesceBegun) -> dict[str, str]:
    return {one.name: one.state for one in _of_servers(begun.writers)}


async def test_without_a_server_they_are_absent(agent: Agent) -> None:
    session_id = str(uuid.uuid4())
    begun = await agent.quiesce_begin(session_id, LEASE_MS, mountpoints=ELSEWHERE)
    await agent.quiesce_end(session_id)
    assert _states(begun) == dict.fromkeys(NAMES, "absent")
    assert begun.consistency == "filesystem"
    reasons = {one.name: one.reason for one in _of_servers(begun.writers)}
    assert reasons == {
        "mariadb": "no process mariadbd or process mysqld",
        "postgresql": "no /run/postgresql/.s.PGSQL.* or [writer.postgresql]",
        "redis": "no process redis-server or process valkey-server",
    }


@pytest.mark.usefixtures("servers")
async def test_a_snapshot_of_everything_tells_where_each_server_stood(
    agent: Agent, measured: Callable[[str], None]
) -> None:
    session_id = str(uuid.uuid4())
    begun = await agent.quiesce_begin(session_id, LEASE_MS)
    ended = await agent.quiesce_end(session_id)
    assert _states(begun) == dict.fromkeys(NAMES, "frozen"), begun.writers
    assert begun.consistency == "application"
    assert (ended.held, ended.reason) == (True, None)
    spent = ", ".join(f"{one.name} {one.ms:.0f}" for one in _of_servers(begun.writers))
    measured(f"writers with their servers, start to frozen: {spent} ms")
    detail = {one.name: one.detail or {} for one in _of_servers(begun.writers)}
    (cluster,) = json.loads(detail["postgresql"]["clusters"])
    assert (cluster["timeline"], cluster["standby"]) == (1, False)
    assert "/" in cluster["wal-lsn"]
    assert re.search(r"\.\d{6}$", detail["mariadb"]["binlog-file"])
    assert int(detail["mariadb"]["binlog-position"]) > 0
    (server,) = json.loads(detail["redis"]["servers"])
    assert server["changes-since"] == 0


@pytest.mark.usefixtures("servers")
async def test_mariadb_s_commits_wait_until_the_thaw(guest: Guest, agent: Agent) -> None:
    session_id = str(uuid.uuid4())
    begun = await agent.quiesce_begin(session_id, LEASE_MS, mountpoints=ELSEWHERE)
    assert _states(begun)["mariadb"] == "frozen"
    guest.run(INSERT + WAIT_HELD_BACK, timeout_s=60)
    assert guest.run("mariadb -Ne 'select count(*) from lab.t'").stdout == "0\n"
    ended = await agent.quiesce_end(session_id)
    assert ended.held
    guest.run(WAIT_INSERTED, timeout_s=60)


@pytest.mark.usefixtures("servers")
async def test_servers_killed_between_prepare_and_freeze_are_failures(guest: Guest, agent: Agent) -> None:
    guest.put(KILLER, KILL_AT_FREEZE.encode(), 0o755)
    session_id = str(uuid.uuid4())
    try:
        begun = await agent.quiesce_begin(session_id, LEASE_MS, mountpoints=ELSEWHERE)
        ended = await agent.quiesce_end(session_id)
    finally:
        guest.run(["rm", KILLER])
        _start(guest)
    assert _states(begun) == dict.fromkeys(NAMES, "failed"), begun.writers
    assert begun.consistency == "filesystem"
    assert ended.held


@pytest.mark.usefixtures("servers")
async def test_servers_killed_while_frozen_break_the_hold(guest: Guest, agent: Agent) -> None:
    session_id = str(uuid.uuid4())
    begun = await agent.quiesce_begin(session_id, LEASE_MS, mountpoints=ELSEWHERE)
    assert _states(begun) == dict.fromkeys(NAMES, "frozen"), begun.writers
    guest.run(f"systemctl kill --signal=KILL {UNITS}", timeout_s=60)
    ended = await agent.quiesce_end(session_id)
    _start(guest)
    assert (ended.held, ended.reason) == (False, "writer-lost")
    assert {one.name: one.state for one in _of_servers(ended.writers)} == dict.fromkeys(NAMES, "lost")


@pytest.mark.usefixtures("servers")
async def test_servers_that_do_not_answer_cost_no_more_than_a_deadline(guest: Guest, vsock: str, token: str) -> None:
    session_id = str(uuid.uuid4())
    with configured(guest, IMPATIENT):
        async with Agent.connect(vsock, token=token) as agent:
            guest.run(f"systemctl kill --signal=STOP {UNITS}", timeout_s=60)
            try:
                begun = await agent.quiesce_begin(session_id, LEASE_MS, mountpoints=ELSEWHERE)
                ended = await agent.quiesce_end(session_id)
            finally:
                guest.run(f"systemctl kill --signal=CONT {UNITS}", timeout_s=60)
    reasons = {one.name: one.reason or "" for one in _of_servers(begun.writers)}
    assert all("in time" in reason for reason in reasons.values()), reasons
    assert begun.consistency == "filesystem"
    assert ended.held
