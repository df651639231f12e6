"""What a freeze changes of the whole system's settings for a moment, and that it is put back whatever happens."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterator

import pytest

from ballast.host.agent import Agent
from ballast.wire.errors import AgentError
from tests.lab.guest import Guest

LOAD, LIMITS, STOP = "/root/.lab-load", "/run/lab-limits", "/run/lab-stop"
WRITE = f"until [ -e {STOP} ]; do dd if=/dev/zero of={LOAD} bs=1M count=64 conv=notrunc status=none; done"
WATCH = f"until [ -e {STOP} ]; do now=$(cat /proc/sys/vm/dirty_bytes); [ $now = 0 ] || echo $now; done >{LIMITS}"
KILL = "until [ $(cat /proc/sys/vm/dirty_bytes) != 0 ]; do :; done; systemctl kill -s KILL ballast-guard"
IS_AS_BEFORE = """
until grep -qx 0 /sys/kernel/rcu_expedited && grep -qx 20 /proc/sys/vm/dirty_ratio &&
    grep -qx 10 /proc/sys/vm/dirty_background_ratio && ! ls /run/ballast/dirty-limits /run/ballast/rcu-expedited
do sleep 0.1; done 2>/dev/null
"""


@pytest.fixture
def load(guest: Guest) -> Iterator[Guest]:
    """A guest that writes as fast as it can, and in which somebody watches the limit."""
    guest.run(f"rm -f {STOP} {LIMITS}; (setsid sh -c '{WRITE}' & setsid sh -c '{WATCH}' &) >/dev/null 2>&1")
    try:
        guest.run("until [ $(awk '/^Dirty:/ { print $2 }' /proc/meminfo) -gt 30000 ]; do sleep 0.1; done", timeout_s=60)
        yield guest
    finally:
        guest.run(f"touch {STOP}; sleep 0.5; rm -f {LOAD}", timeout_s=60)


async def test_the_dirty_limit_comes_down_for_a_freeze_and_is_put_back(load: Guest, vsock: str, token: str) -> None:
    session_id = str(uuid.uuid4())
    async with Agent.connect(vsock, token=token) as agent:
        await agent.quiesce_begin(session_id, 60_000, mountpoints=["/"])
        load.run(IS_AS_BEFORE, timeout_s=30)
        assert (await agent.quiesce_end(session_id)).held
    seen = [int(line) for line in load.run(["cat", LIMITS]).stdout.split()]
    assert 4 << 20 <= min(seen) < 20 << 20


async def test_it_is_put_back_after_a_guard_that_was_killed(load: Guest, vsock: str, token: str) -> None:
    load.run(f"(setsid sh -c '{KILL}' &) >/dev/null 2>&1")
    session_id = str(uuid.uuid4())
    async with Agent.connect(vsock, token=token) as agent:
        with contextlib.suppress(AgentError):  # or it was frozen already, and is lost
            await agent.quiesce_begin(session_id, 60_000, mountpoints=["/"])
        load.run(IS_AS_BEFORE, timeout_s=30)
        with contextlib.suppress(AgentError):
            await agent.quiesce_end(session_id)
    assert load.run(["cat", LIMITS]).stdout.split()
