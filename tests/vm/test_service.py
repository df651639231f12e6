"""The agent as a service of systemd's: its configuration, its policy, and how it stops."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from ballast.host.agent import Agent
from tests.lab.guest import Guest
from tests.vm.raw import Raw, request
from tests.vm.unit import AGENT, DROP_IN, configured, show

EXIT_CONFIG = 78
RESCUE = "setsid sh -c 'sleep 60; fsfreeze -u /mnt/data0; fsfreeze -u /mnt/data1' </dev/null >/dev/null 2>&1 & echo $!"


@contextmanager
def wrong_configuration(guest: Guest, toml: str) -> Iterator[None]:
    guest.put(DROP_IN, toml.encode())
    try:
        yield
    finally:
        guest.run(f"rm {DROP_IN}; systemctl reset-failed {AGENT}; systemctl start {AGENT}")


@pytest.mark.parametrize(
    ("toml", "key", "why"),
    [
        ("[limits]\nqeue-bytes = 1\n", "limits.qeue-bytes", "unknown key"),
        ("[quiesce]\nlease-ms = 7\n", "quiesce.lease-ms", "expected 1000 to 600000, found 7"),
    ],
    ids=["key", "value"],
)
def test_a_wrong_configuration_stops_the_start_with_file_key_and_reason(
    guest: Guest, toml: str, key: str, why: str
) -> None:
    said = f"{DROP_IN}: {key}: {why}"
    with wrong_configuration(guest, toml):
        checked = guest.run(["ballastd", "--check"], check=False)
        assert checked.returncode == EXIT_CONFIG
        assert said in checked.stderr
        assert guest.run(["systemctl", "restart", AGENT], check=False).returncode != 0
        # Not "activating": that would be a start that is tried again and again.
        assert show(guest, "ActiveState") == "failed"
        assert show(guest, "ExecMainStatus") == str(EXIT_CONFIG)
        assert said in guest.run(["journalctl", f"--unit={AGENT}", "--lines=20", "--output=cat"]).stdout
    assert guest.run(["ballastd", "--check"]).stdout == ""
    assert show(guest, "ActiveState") == "active"


DISABLED = "Command {} has been disabled: the command is not allowed"


@pytest.mark.parametrize(
    ("toml", "refused", "allowed"),
    [
        ('[policy]\nblock = ["guest-get-memory-blocks"]\n', "guest-get-memory-blocks", "guest-fsfreeze-status"),
        ('[policy]\nallow = ["guest-info", "guest-sync"]\n', "guest-ping", "guest-sync"),
        ('[policy]\nallow = ["guest-info", "guest-ping"]\nblock = ["guest-ping"]\n', "guest-ping", "guest-info"),
    ],
    ids=["block", "allow", "both"],
)
def test_what_policy_refuses_is_refused_as_qemu_ga_does(
    guest: Guest, serial: str, toml: str, refused: str, allowed: str
) -> None:
    with configured(guest, toml), Raw(serial) as raw:
        error = raw.ask(refused)["error"]
        assert (error["class"], error["desc"]) == ("CommandNotFound", DISABLED.format(refused))
        assert error["data"]["reason"] == "refused-by-policy"
        raw.send(request(allowed, **({"id": 1} if allowed == "guest-sync" else {})))
        assert b'"return"' in raw.read_line()
        enabled = {one["name"]: one["enabled"] for one in raw.ask("guest-info")["return"]["supported_commands"]}
        assert (enabled[refused], enabled[allowed]) == (False, True)


async def test_an_agent_that_is_stopped_while_frozen_thaws_first_and_exits_well(
    guest: Guest, vsock: str, token: str
) -> None:
    session = str(uuid.uuid4())
    rescue = guest.run(RESCUE).stdout.strip()
    async with Agent.connect(vsock, token) as agent:
        await agent.quiesce_begin(session, 60_000, mountpoints=["/mnt/data0", "/mnt/data1"])
        guest.run(["systemctl", "stop", AGENT])
    assert (show(guest, "Result"), show(guest, "ExecMainStatus"), show(guest, "ActiveState")) == (
        "success",
        "0",
        "inactive",
    )
    guest.run("touch /mnt/data0/written /mnt/data1/written; pkill -s " + rescue, timeout_s=5)
    guest.run(["systemctl", "start", AGENT])
    async with Agent.connect(vsock, token) as agent:
        ended = await agent.quiesce_end(session)
    assert (ended.held, ended.reason) == (False, "agent-restarted")
