"""A forecast as a peer gets it."""

from __future__ import annotations

import pytest

from ballast.guest.config import Quiesce as Settings
from ballast.guest.quiesce.outlook import Outlook
from ballast.wire.errors import AgentError, BadRequest
from ballast.wire.names import QuiesceForecast, Risk, Skipped
from tests.unit.guest.conftest import MakeTree
from tests.unit.guest.quiesce.conftest import FakeSystemd
from tests.unit.guest.quiesce.trees import ROOT, table

MOUNTS = table(ROOT, "8:17 xfs /dev/sdb1 /srv", "0:30 tmpfs none /srv/cache", "0:31 tmpfs none /run")
HUNG = {"proc/sys/kernel/hung_task_timeout_secs": "60\n", "proc/sys/kernel/hung_task_panic": "1\n"}
CLEAN = {"proc/meminfo": "Dirty: 0 kB\n"}


async def test_a_forecast_has_order_skips_risks_and_dirty_bytes(make_tree: MakeTree, systemd: FakeSystemd) -> None:
    meminfo = "MemTotal: 1 kB\nDirty:              100 kB\nWriteback:            28 kB\nWritebackTmp:     4 kB\n"
    systemd.timers("exit 1")
    outlook = Outlook(make_tree(MOUNTS | HUNG | {"proc/meminfo": meminfo}), Settings(), systemd.start)
    assert await outlook.forecast() == QuiesceForecast(
        [["/", "/srv"]],
        [Skipped("/srv/cache", "tmpfs cannot be frozen")],
        [
            Risk("hung-task-panic", "the kernel panics when a task waits for 60 s (kernel.hung_task_panic)"),
            Risk("timer", "cannot tell: systemctl exits with 1"),
        ],
        128 << 10,
    )


async def test_a_peer_gets_it_for_the_configured_lease(make_tree: MakeTree, systemd: FakeSystemd) -> None:
    outlook = Outlook(make_tree(MOUNTS | CLEAN | HUNG), Settings(lease_ms=60_000), systemd.start)
    assert [risk.kind for risk in (await outlook.forecast()).risks] == ["hung-task-panic"]
    assert (await outlook.forecast(59_000)).risks == []
    assert (await outlook.forecast(mountpoints=["/srv"])).order == [["/srv"]]
    assert (await outlook.forecast(exclude=["/s*"])).order == [["/"]]
    with pytest.raises(BadRequest, match="'lease-ms' expects 1000 to 600000"):
        await outlook.forecast(999)
    with pytest.raises(BadRequest, match="'mountpoints' names no mount point: /nowhere"):
        await outlook.forecast(mountpoints=["/nowhere"])


async def test_where_nothing_would_be_frozen_there_is_no_risk(make_tree: MakeTree, systemd: FakeSystemd) -> None:
    outlook = Outlook(make_tree(MOUNTS | CLEAN | HUNG), Settings(), systemd.start)
    assert await outlook.forecast(exclude=["/*"]) == QuiesceForecast(
        [],
        [Skipped("/", "excluded"), Skipped("/srv", "excluded"), Skipped("/srv/cache", "tmpfs cannot be frozen")],
        [],
        0,
    )
    assert systemd.units == []


async def test_a_system_without_proc_is_an_error(make_tree: MakeTree, systemd: FakeSystemd) -> None:
    with pytest.raises(AgentError, match="cannot read the table of mounts"):
        await Outlook(make_tree({}), Settings(), systemd.start).forecast()
    with pytest.raises(AgentError, match="cannot read how much is to be written"):
        await Outlook(make_tree(MOUNTS), Settings(), systemd.start).forecast()
