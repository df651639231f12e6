"""While the root file system is frozen, journal and all: who is answered, who is refused, and what is written down."""

from __future__ import annotations

import json
import uuid

from ballast.host.agent import Agent
from tests.lab.guest import Guest
from tests.vm.raw import Raw, request
from tests.vm.unit import AGENT

LINES = 300
ANSWERED = [
    request("guest-ping"),
    request("guest-info"),
    request("guest-sync", id=1),
    request("guest-fsfreeze-status"),
    request("ballast-agent-status"),
    request("ballast-memory-status"),
    request("ballast-balloon-ranges"),
    request("ballast-quiesce-status"),
]
REFUSED = [
    request("ballast-memory-online"),
    request("ballast-memory-offline", bytes=0),
    request("ballast-balloon-inflate", target_bytes=1 << 26),
    request("ballast-quiesce-forecast"),
    request("guest-fsfreeze-freeze"),
]


async def test_who_only_looks_is_answered_and_every_line_is_in_the_journal(
    guest: Guest, serial: str, vsock: str, token: str
) -> None:
    session_id = str(uuid.uuid4())
    async with Agent.connect(vsock, token=token) as agent:
        await agent.quiesce_begin(session_id, 60_000, mountpoints=["/"])
        with Raw(serial) as peer:
            for line in ANSWERED:
                peer.send(line)
                assert "return" in json.loads(peer.read_line()), line
            peer.send(request("ballast-quiesce-renew", id=session_id, lease_ms=60_000))
            assert json.loads(peer.read_line()) == {"return": {"lease-ms": 60_000}}
            for line in REFUSED:
                peer.send(line)
                error = json.loads(peer.read_line())["error"]
                name = json.loads(line)["execute"]
                assert error["class"] == "CommandNotFound"
                assert error["desc"] == f"Command {name} has been disabled: the command is not allowed"
            # Audited, and of no effect: there is no balloon so large.
            for number in range(LINES):
                peer.send(request("ballast-balloon-deflate", target_bytes=(1 << 50) + number))
                assert "return" in json.loads(peer.read_line())
        ended = await agent.quiesce_end(session_id)
    assert ended.held
    # The last line is the end's own.
    guest.run(
        f"until journalctl -u {AGENT} -n 5 -o cat | grep -q 'ran ballast-quiesce-end'; do sleep 0.1; done", timeout_s=30
    )
    journal = guest.run(["journalctl", f"--unit={AGENT}", "--lines=1000", "--output=cat"]).stdout.splitlines()
    begun = max(number for number, line in enumerate(journal) if "ran ballast-quiesce-begin" in line)
    after = journal[begun:]
    assert sum("ran ballast-balloon-deflate" in line for line in after) == LINES
    assert not any("dropped" in line for line in after)
