"""Hooks of qemu-ga, open-vm-tools and Azure, and units, through the whole agent."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncIterator, Iterator

import pytest

from ballast.host.agent import Agent
from ballast.wire.errors import AgentError
from ballast.wire.names import QuiesceEnded
from tests.lab.guest import Guest
from tests.vm.unit import configured

LOG = "/run/lab-hooks.log"
QEMU, VMWARE, AZURE = "/etc/qemu/fsfreeze-hook.d", "/etc/vmware-tools/backupScripts.d", "/etc/azure"
AZURE_CONFIG = f"{AZURE}/VMSnapshotScriptPluginConfig.json"
NAMES = ("azure-scripts", "qemu-hooks", "vmware-scripts")
LEASE_MS = 30_000
# What a thaw hook starts, a server say, outlives the writer's unit.
DAEMON = 'if [ "$1" = thaw ]; then sleep 600 & echo $! >/run/lab-daemon.pid; fi'
CLEAN = f"rm -rf {QEMU}/* {VMWARE} {AZURE} {LOG} /run/lab-daemon.pid"

APP = "[Service]\nExecStart=sleep infinity\n"
QUEUE = f"""[Service]
Type=notify
NotifyAccess=all
ExecStart=/bin/sh -c 'trap "echo hold >>{LOG}" USR1; trap "echo go >>{LOG}" USR2; systemd-notify --ready; \\
    while :; do sleep infinity & wait; done'
"""
UNITS = """[writer.units]
stop = ["test-app.service", "test-idle.service"]
signal = {"test-queue.service" = "SIGUSR1/SIGUSR2"}
"""


class Hooks:
    """Hooks in the guest, and what they were told."""

    def __init__(self, guest: Guest) -> None:
        self._guest = guest

    def add(self, path: str, body: str = "", mode: int = 0o755) -> None:
        """One that logs its name and first argument, and then does ``body``."""
        name = path.rpartition("/")[2]
        self._guest.put(path, f'#!/bin/sh\necho {name} "$1" >>{LOG}\n{body}\n'.encode(), mode)

    def told(self) -> list[str]:
        """Who was told what, in order, when every writer has gone."""
        self._guest.run(
            "while ls -d /run/ballast/writers/* /sys/fs/cgroup/ballast.slice/ballast-writer-*; do sleep 0.1; done",
            timeout_s=60,
        )
        return self._guest.run(f"cat {LOG} || true").stdout.splitlines()


@pytest.fixture
def hooks(guest: Guest) -> Iterator[Hooks]:
    guest.run(f"mkdir -p {QEMU} {VMWARE} {AZURE}")
    yield Hooks(guest)
    guest.run(CLEAN)


@pytest.fixture
async def agent(vsock: str, token: str) -> AsyncIterator[Agent]:
    async with Agent.connect(vsock, token=token) as connected:
        yield connected


@pytest.fixture
def units(guest: Guest) -> Iterator[None]:
    """One to stop, one to signal, and one that does not run; the agent knows of them."""
    for name, text in (("app", APP), ("idle", APP), ("queue", QUEUE)):
        guest.put(f"/run/systemd/system/test-{name}.service", text.encode())
    guest.run("systemctl daemon-reload; systemctl start test-app test-queue", timeout_s=60)
    with configured(guest, UNITS):
        yield
    guest.run(
        f"systemctl stop 'test-*.service'; rm -f {LOG} /run/systemd/system/test-*.service; systemctl daemon-reload"
    )


async def test_existing_hooks_keep_working(guest: Guest, hooks: Hooks, agent: Agent) -> None:
    hooks.add(f"{QEMU}/10-db", DAEMON)
    hooks.add(f"{QEMU}/20-web")
    hooks.add(f"{QEMU}/20-web.dpkg-old")
    hooks.add(f"{VMWARE}/script")
    hooks.add(f"{AZURE}/pre.sh", mode=0o700)
    hooks.add(f"{AZURE}/post.sh", mode=0o700)
    scripts = {"preScriptLocation": f"{AZURE}/pre.sh", "postScriptLocation": f"{AZURE}/post.sh"}
    guest.put(AZURE_CONFIG, json.dumps(scripts | {"preScriptParams": ["a b"]}).encode(), 0o600)
    session_id = str(uuid.uuid4())
    begun = await agent.quiesce_begin(session_id, LEASE_MS)
    ended = await agent.quiesce_end(session_id)
    assert {one.name: one.state for one in begun.writers if one.name in NAMES} == dict.fromkeys(NAMES, "frozen")
    assert (begun.consistency, ended.held, ended.reason) == ("application", True, None)
    told = hooks.told()
    assert [line for line in told if line[0].isdigit()] == [
        "10-db freeze",
        "20-web freeze",
        "20-web thaw",
        "10-db thaw",
    ]
    assert [line for line in told if line.startswith("script")] == ["script freeze", "script thaw"]
    assert [line for line in told if line.startswith("p")] == ["pre.sh a b", "post.sh "]
    guest.run("kill $(cat /run/lab-daemon.pid)")  # it was there


async def test_a_hook_that_fails_stops_the_backup(guest: Guest, hooks: Hooks, agent: Agent) -> None:
    hooks.add(f"{QEMU}/10-db")
    hooks.add(f"{QEMU}/20-web", '[ "$1" = thaw ] || { echo no such host; exit 1; }')
    hooks.add(f"{VMWARE}/script")
    with pytest.raises(AgentError) as caught:
        await agent.quiesce_begin(str(uuid.uuid4()), LEASE_MS)
    assert f"{QEMU}/20-web exited 1: no such host" in caught.value.desc
    assert (await agent.quiesce_status()).state == "thawed"
    told = hooks.told()
    assert [line for line in told if line[0].isdigit()] == [
        "10-db freeze",
        "20-web freeze",
        "20-web thaw",
        "10-db thaw",
    ]
    assert [line for line in told if line.startswith("script")] == ["script freeze", "script freezeFail"]


async def test_without_an_agent_hooks_are_undone_once(guest: Guest, hooks: Hooks, vsock: str, token: str) -> None:
    hooks.add(f"{QEMU}/10-db")
    hooks.add(f"{VMWARE}/script")
    session_id = str(uuid.uuid4())
    async with Agent.connect(vsock, token=token) as agent:
        await agent.quiesce_begin(session_id, LEASE_MS)
    guest.run("systemctl kill -s KILL ballast-agent")
    ended = await _end(vsock, token, session_id)
    assert (ended.held, ended.reason) == (False, "agent-restarted")
    assert sorted(hooks.told()) == ["10-db freeze", "10-db thaw", "script freeze", "script freezeFail"]


@pytest.mark.usefixtures("units")
async def test_units_stop_and_are_signalled_and_run_again(guest: Guest, vsock: str, token: str) -> None:
    hooks, session_id = Hooks(guest), str(uuid.uuid4())
    async with Agent.connect(vsock, token=token) as agent:
        begun = await agent.quiesce_begin(session_id, LEASE_MS)
        assert _active(guest) == ["inactive", "inactive", "active"], begun.writers
        ended = await agent.quiesce_end(session_id)
        assert (begun.consistency, ended.held) == ("application", True), ended.writers
    assert hooks.told() == ["hold", "go"]
    assert _active(guest) == ["active", "inactive", "active"]


def _active(guest: Guest) -> list[str]:
    return guest.run("systemctl is-active test-app test-idle test-queue || true").stdout.split()


async def _end(vsock: str, token: str, session_id: str) -> QuiesceEnded:
    """Ask an agent that may just be starting again."""
    deadline_s = time.monotonic() + 90
    while True:
        try:
            async with Agent.connect(vsock, token=token) as agent:
                return await agent.quiesce_end(session_id)
        except (AgentError, OSError):
            assert time.monotonic() < deadline_s
            time.sleep(0.2)
