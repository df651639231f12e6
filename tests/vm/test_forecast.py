"""What may go wrong in a freeze of a real guest: nothing if left alone; what is provoked has its culprit's name."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ballast.host.agent import Agent
from tests.lab.guest import Guest

HUNG_TASK = "/proc/sys/kernel/hung_task_panic"
HIDE = """
truncate -s 32M /mnt/data0/hidden.img
mkfs.ext4 -q /mnt/data0/hidden.img
mkdir -p /mnt/hidden
setsid unshare --mount sh -c 'mount -o loop /mnt/data0/hidden.img /mnt/hidden; exec sleep 600' </dev/null &>/dev/null &
until pid=$(pgrep -nx sleep) && grep -q /mnt/hidden /proc/$pid/mountinfo; do sleep 0.1; done
echo $pid >/run/hidden.pid
cat /run/hidden.pid
"""
SHOW = """
kill $(cat /run/hidden.pid)
while [ -e /proc/$(cat /run/hidden.pid) ]; do sleep 0.1; done
rm -f /mnt/data0/hidden.img /run/hidden.pid
rmdir /mnt/hidden
"""


@pytest.fixture
def hidden(guest: Guest) -> Iterator[int]:
    """A process that alone has a file system mounted."""
    yield int(guest.run(HIDE, timeout_s=60).stdout)
    guest.run(SHOW, timeout_s=60)


@pytest.fixture
def panicking(guest: Guest) -> Iterator[None]:
    """A kernel that panics when a task waits for two minutes."""
    guest.run(f"echo 1 >{HUNG_TASK}")
    yield
    guest.run(f"echo 0 >{HUNG_TASK}")


async def test_a_guest_that_is_left_alone_has_no_risks(guest: Guest, vsock: str, token: str) -> None:
    async with Agent.connect(vsock, token) as agent:
        guest.run("dd if=/dev/zero of=/mnt/data0/dirty bs=1M count=16 status=none")
        told = await agent.quiesce_forecast()
        guest.run("rm /mnt/data0/dirty")
    (level,) = told.order
    assert {"/", "/mnt/data0", "/mnt/data1", "/mnt/data2"} <= set(level)
    assert told.risks == []
    assert told.dirty_bytes > 0


@pytest.mark.usefixtures("panicking")
async def test_a_risk_has_its_culprit_s_name(hidden: int, vsock: str, token: str) -> None:
    async with Agent.connect(vsock, token) as agent:
        told = {risk.kind: risk.detail for risk in (await agent.quiesce_forecast()).risks}
        assert told.keys() == {"hung-task-panic", "hidden-disk"}
        assert f"(ext4) is mounted for sleep ({hidden}) alone, at /mnt/hidden" in told["hidden-disk"]
        brief = {risk.kind for risk in (await agent.quiesce_forecast(lease_ms=10_000)).risks}
        assert brief == {"hidden-disk"}
