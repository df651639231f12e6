"""The packages' life in a guest of either Debian, at the worst of times: upgrade, downgrade, removal, purge.

Each test brings about the version that it begins with, which costs nothing in the order that they stand in.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.lab.guest import Guest
from tests.vm.conftest import DIST, NEXT, TOKEN
from tests.vm.package import DPKG_TIMEOUT_S, bring, dpkg, dpkg_running, installed, put, traces, version_of
from tests.vm.raw import Raw
from tests.vm.unit import AGENT, show

GUARD, HOLDER = "ballast-guard.service", "ballast-balloon.service"
CONFIGURATION, ADMINS_FILE = "/etc/ballast/agent.toml", "/etc/ballast/agent.d/admin.toml"
ADMINS_WRITER = "/etc/ballast/writers.d/app"
CHUNK_BYTES = 64 << 20
LONG_LEASE_MS = 300_000
MOUNTPOINTS = ["/", "/mnt/data0", "/mnt/data1", "/mnt/data2"]
RESCUE_S = 200
RESCUE = "setsid sh -c 'sleep {}; for m in {}; do fsfreeze -u $m; done' </dev/null >/dev/null 2>&1 & echo $!"
KILLED_INSTALLATION = """
setsid dpkg --install {} </dev/null >/dev/null 2>&1 &
state() {{ dpkg-query --show --showformat '${{db:Status-Status}}' ballast-agent 2>/dev/null || true; }}
until [ "$(state)" = half-configured ]; do sleep 0.1; done
kill -KILL -- -$!
"""


@pytest.fixture(scope="module", params=["guest", "bookworm"], ids=["trixie", "bookworm"])
def machine(request: pytest.FixtureRequest) -> Iterator[Guest]:
    """Each guest in turn; afterwards it is as it was found."""
    guest: Guest = request.getfixturevalue(request.param)
    yield guest
    bring(guest, DIST)
    assert show(guest, "ActiveState") == "active"


@contextmanager
def connected(machine: Guest) -> Iterator[Raw]:
    with Raw(f"unix:{machine.vsock_path}?connect=640", timeout_s=DPKG_TIMEOUT_S) as raw:
        assert raw.ask("ballast-authenticate", token=TOKEN) == {"return": {}}
        yield raw


def ask(machine: Guest, command: str, /, **arguments: Any) -> dict[str, Any]:
    """The answer, over a connection of its own."""
    with connected(machine) as raw:
        answer: dict[str, Any] = raw.ask(command, **arguments)["return"]
        return answer


@contextmanager
def frozen(machine: Guest, mountpoints: list[str]) -> Iterator[str]:
    """A freeze's id; whatever goes wrong, all is thawed some time."""
    rescue = machine.run(RESCUE.format(RESCUE_S, " ".join(MOUNTPOINTS))).stdout.strip()
    session = str(uuid.uuid4())
    begun = ask(machine, "ballast-quiesce-begin", id=session, lease_ms=LONG_LEASE_MS, mountpoints=mountpoints)
    assert [one["state"] for one in begun["filesystems"]] == ["frozen"] * len(mountpoints)
    yield session
    machine.run(f"pkill -s {rescue}; for m in {' '.join(MOUNTPOINTS)}; do touch $m/written; rm $m/written; done")


def inflate(machine: Guest, target_bytes: int, *, acked: bool) -> dict[str, Any]:
    inflated = ask(machine, "ballast-balloon-inflate", target_bytes=target_bytes)
    assert inflated["total-bytes"] == target_bytes
    if acked:
        assert ask(machine, "ballast-balloon-ack", chunk=inflated["chunk"], punched_bytes=0) == {}
    return inflated


def wait_for_event(raw: Raw, name: str, **data: Any) -> None:
    """Read events until one says that; TimeoutError, EOFError."""
    while True:
        event = json.loads(raw.read_line())
        if event["event"] == name and data.items() <= event["data"].items():
            return


def process(machine: Guest, unit: str) -> str:
    """Its main process: no two have the same number and start."""
    return machine.run(f"cut -d' ' -f1,22 /proc/{show(machine, 'MainPID', unit)}/stat").stdout


def test_an_upgrade_sleeps_while_the_root_is_frozen_and_then_goes_on(machine: Guest) -> None:
    bring(machine, DIST)
    machine.run(f"echo '# the administrator was here' >>{CONFIGURATION}")
    debs = put(machine, NEXT)
    with frozen(machine, MOUNTPOINTS) as session:
        with dpkg_running(machine, "--install", *debs):
            # It waits to write, like everybody else.
            machine.run(
                "until grep -q percpu_rwsem_wait /proc/$(pgrep -x dpkg)/wchan; do sleep 0.2; done", timeout_s=60
            )
            assert ask(machine, "ballast-quiesce-status")["state"] == "frozen"
            assert installed(machine) == version_of(DIST)
            ask(machine, "ballast-quiesce-renew", id=session, lease_ms=1000)
        ended = ask(machine, "ballast-quiesce-end", id=session)
    assert (ended["held"], ended["reason"]) == (False, "lease-expired")
    assert ask(machine, "ballast-agent-status")["version"] == installed(machine) == version_of(NEXT)
    assert "the administrator was here" in machine.get(CONFIGURATION).decode()
    assert machine.run("ls -A /etc/ballast").stdout.split() == ["agent.d", "agent.toml", "writers.d"]


def test_a_downgrade_gives_the_balloon_back_and_the_host_is_told(machine: Guest) -> None:
    """Whether the older agent knew how to speak to the newer holder nobody can say."""
    bring(machine, NEXT)
    inflate(machine, CHUNK_BYTES, acked=True)
    with connected(machine) as raw:
        raw.ask("ballast-subscribe", events=["BALLAST_BALLOON"])
        with dpkg_running(machine, "--install", *put(machine, DIST)):
            wait_for_event(raw, "BALLAST_BALLOON", **{"total-bytes": 0})
    assert ask(machine, "ballast-agent-status")["version"] == installed(machine) == version_of(DIST)
    assert ask(machine, "ballast-balloon-ranges")["total-bytes"] == 0
    assert show(machine, "ActiveState", HOLDER) == "inactive"


def test_an_upgrade_keeps_the_balloon_and_ends_a_freeze_of_a_data_disk_and_says_so(machine: Guest) -> None:
    """Interrupted half-way, as by a power cut or Ctrl-C, the agent goes on; `dpkg --configure` finishes it."""
    bring(machine, DIST)
    inflate(machine, CHUNK_BYTES, acked=True)
    waiting = inflate(machine, 2 * CHUNK_BYTES, acked=False)
    held, holder = ask(machine, "ballast-balloon-ranges"), process(machine, HOLDER)
    dpkg(machine, "--unpack", *put(machine, NEXT))
    with frozen(machine, ["/mnt/data0"]) as session:
        dpkg(machine, "--configure", "--pending")
        ended = ask(machine, "ballast-quiesce-end", id=session)
    assert (ended["held"], ended["reason"]) == (False, "agent-restarted")
    said = machine.run(["journalctl", f"--unit={AGENT}", "--lines=50", "--output=cat"]).stdout
    assert f"freeze {session} is thawed: agent-restarted" in said
    assert ask(machine, "ballast-agent-status")["version"] == installed(machine) == version_of(NEXT)
    assert ask(machine, "ballast-balloon-ranges") == held
    assert process(machine, HOLDER) == holder
    # The new agent drives the holder that was there, and knows the chunk that waits for its ack.
    assert inflate(machine, 2 * CHUNK_BYTES, acked=True)["chunk"] == waiting["chunk"]
    assert ask(machine, "ballast-balloon-deflate", target_bytes=0)["bytes"] == 2 * CHUNK_BYTES


def test_after_removal_and_purge_nothing_is_left(machine: Guest) -> None:
    bring(machine, NEXT)
    machine.put(ADMINS_FILE, b'[agent]\nlog-level = "info"\n')
    machine.put(ADMINS_WRITER, b"#!/bin/sh\n", 0o755)
    machine.run("udevadm trigger --settle --action=add --subsystem-match=virtio-ports")
    with frozen(machine, ["/mnt/data0"]):
        machine.run(
            f"systemctl kill --signal=KILL {GUARD}; until systemctl --quiet is-failed {GUARD}; do sleep 0.1; done"
        )
    inflate(machine, CHUNK_BYTES, acked=True)
    waiting = inflate(machine, 2 * CHUNK_BYTES, acked=False)
    with connected(machine) as raw:
        raw.ask("ballast-subscribe", events=["BALLAST_BALLOON"])
        with dpkg_running(machine, "--remove", "ballast-agent"):
            wait_for_event(raw, "BALLAST_BALLOON", **{"total-bytes": 0, "chunk": waiting["chunk"]})
    assert machine.run("systemctl list-units --no-legend 'ballast*'").stdout == ""
    assert machine.get(ADMINS_FILE)
    assert machine.get(ADMINS_WRITER)
    dpkg(machine, "--purge", "ballast-agent", "ballast-common")
    assert traces(machine) == ""


def test_an_installation_that_was_killed_is_finished_by_configure(machine: Guest) -> None:
    dpkg(machine, "--purge", "ballast-agent", "ballast-common")
    machine.run(KILLED_INSTALLATION.format(" ".join(put(machine, DIST))), timeout_s=DPKG_TIMEOUT_S)
    dpkg(machine, "--configure", "--pending")
    assert ask(machine, "ballast-agent-status")["version"] == installed(machine) == version_of(DIST)
    assert "the administrator was here" not in machine.get(CONFIGURATION).decode()
