"""A guest of the oldest Debian that we promise: Linux 6.1, systemd 252, Python 3.11."""

from __future__ import annotations

import asyncio
import uuid

import pytest

from ballast.host.agent import Agent
from ballast.wire.memory_names import PsiTrigger
from tests.lab.guest import Guest
from tests.vm import test_dbus as dbus
from tests.vm.raw import Raw

DEADLINE_S = 60.0
BLOCKS, BLOCK_BYTES = 4, 128 << 20
MOUNTPOINTS = ["/", "/mnt/data0", "/mnt/data1", "/mnt/data2"]
RESCUE = "setsid sh -c 'sleep 60; for m in {}; do fsfreeze -u $m; done' </dev/null >/dev/null 2>&1 & echo $!"


@pytest.fixture(scope="module")
def target(bookworm: Guest) -> str:
    return f"unix:{bookworm.vsock_path}?connect=640"


def test_the_agent_is_installed_and_answers_on_both_channels(bookworm: Guest, target: str) -> None:
    assert bookworm.run(["systemctl", "is-active", "ballast-agent.service"]).stdout == "active\n"
    assert bookworm.run(["uname", "-r"]).stdout.startswith("6.1.")
    for channel in (target, f"unix:{bookworm.ballast_port}"):
        with Raw(channel) as raw:
            raw.exchange(b"")
            assert raw.ask("guest-ping") == {"return": {}}


def test_the_agent_is_on_the_bus(bookworm: Guest) -> None:
    dbus.wait_name(bookworm)
    assert dbus.get(bookworm, "FreezeState", nobody=True) == "thawed"
    assert dbus.method(bookworm, "Thaw", "s", "x", nobody=True) == "Call failed: Access denied"
    assert dbus.method(bookworm, "Thaw", "s", "x") == "Call failed: no freeze has the id x"


async def test_a_pressure_trigger_of_any_window_is_accepted(target: str, token: str) -> None:
    """Linux 6.1 asks CAP_SYS_RESOURCE for every trigger, later ones for windows that are no multiple of 2 s."""
    async with Agent.connect(target, token) as agent:
        assert (await agent.status()).psi
        await agent.subscribe(["BALLAST_PRESSURE"], psi=[PsiTrigger("some", 150_000, 1_000_000)])
        await agent.subscribe(["BALLAST_PRESSURE"], psi=[PsiTrigger("full", 100_000, 2_000_000)])


async def test_hot_added_memory_comes_online_and_off_again(bookworm: Guest, target: str, token: str) -> None:
    async with Agent.connect(target, token) as agent:
        await agent.subscribe(["BALLAST_MEMORY_ADDED"])
        before = await agent.memory_status()
        bookworm.hot_add(BLOCKS * BLOCK_BYTES, "dimm0")
        online: list[tuple[str, str]] = []
        async with asyncio.timeout(DEADLINE_S):
            while len(online) < BLOCKS:
                event = await anext(agent.events())
                online += [(block["zone"], block["result"]) for block in event.data["blocks"]]
        after = await agent.memory_status()
    assert online == [("movable", "done")] * BLOCKS
    assert after.total_bytes - before.total_bytes == BLOCKS * BLOCK_BYTES
    async with Agent.connect(target, token) as agent:
        gone = await agent.memory_offline(bytes_=BLOCKS * BLOCK_BYTES)
        assert (gone.bytes, [one.offline for one in gone.dimms]) == (BLOCKS * BLOCK_BYTES, [True])
        bookworm.unplug("dimm0", BLOCKS * BLOCK_BYTES)
        assert (await agent.memory_status()).blocks == before.blocks


async def test_root_and_data_disks_freeze_hold_and_thaw(bookworm: Guest, target: str, token: str) -> None:
    session = str(uuid.uuid4())
    rescue = bookworm.run(RESCUE.format(" ".join(MOUNTPOINTS))).stdout.strip()
    async with Agent.connect(target, token) as agent:
        begun = await agent.quiesce_begin(session, 30_000)
        assert {one.mountpoint for one in begun.filesystems if one.state == "frozen"} == set(MOUNTPOINTS)
        refused = bookworm.run("fsfreeze -f /mnt/data0", check=False)  # EBUSY proves a freeze
        ended = await agent.quiesce_end(session)
    assert "Device or resource busy" in refused.stderr
    assert (ended.held, ended.reason) == (True, None)
    bookworm.run(f"touch /written /mnt/data0/written; sync -f /written; pkill -s {rescue}")
