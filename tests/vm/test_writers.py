"""Writers in a real guest: in units of their own, as their own users, undone once and in order whoever dies."""

from __future__ import annotations

import json
import struct
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from ballast.host.agent import Agent
from ballast.wire.errors import AgentError, DeadlineExceeded
from ballast.wire.names import QuiesceEnded
from tests.lab.guest import Guest
from tests.vm.unit import configured

FOLDER, LOG = "/etc/ballast/writers.d", "/run/lab-writers.log"
LEASE_MS = 30_000
PROGRAM = """#!/bin/sh
while read -r request; do
    verb=${{request#*'"verb": "'}}
    verb=${{verb%%'"'*}}
    echo "{name} $verb $(id -un)" >>{log}
    case $verb in
    identify) echo '{identify}' ;;
    freeze) {freeze} ;;
    *) echo '{{}}' ;;
    esac
done
"""
# An empty floppy disk: its boot sector with the parameters of FAT12, and zeros.
FAT = (
    b"\xeb\x3c\x90ballast "
    + struct.pack("<HBHBHHBHHHII", 512, 1, 1, 2, 224, 2880, 0xF0, 9, 18, 2, 0, 0)
    + b"\0\0\x29lab1ballast lab FAT12   ".ljust(474, b"\0")
    + b"\x55\xaa"
)
NFS_PORT = 20490
NFS = Path(__file__).with_name("nfs_server.py")
MOUNT_NFS = f"""
modprobe nfsv3
mkdir -p /mnt/nfs
setsid python3 -IB /run/nfs_server.py {NFS_PORT} </dev/null &>/dev/null & echo $! >/run/nfs.pid
options=addr=127.0.0.1,port={NFS_PORT},mountaddr=127.0.0.1,mountport={NFS_PORT}
options=$options,vers=3,mountvers=3,proto=tcp,mountproto=tcp,nolock,sec=sys
until mount -i -t nfs -o $options 127.0.0.1:/ /mnt/nfs; do sleep 0.2; done
kill -STOP $(cat /run/nfs.pid)
"""
UMOUNT_NFS = "kill -9 $(cat /run/nfs.pid); umount -fl /mnt/nfs; rmdir /mnt/nfs; rm /run/nfs.pid"


class Writers:
    """Test writers in the guest, and what they were told."""

    def __init__(self, guest: Guest) -> None:
        self._guest = guest

    def add(self, name: str, freeze: str = "echo '{}'", **identify: object) -> None:
        said = json.dumps({key.replace("_", "-"): value for key, value in identify.items()})
        program = PROGRAM.format(name=name, log=LOG, identify=said, freeze=freeze)
        self._guest.put(f"{FOLDER}/{name}", program.encode(), 0o755)

    def told(self) -> list[str]:
        """Every "NAME VERB USER", in order."""
        return self._guest.run(["cat", LOG]).stdout.splitlines()

    def wait_gone(self) -> None:
        """Until no unit and no mark of a writer is left."""
        self._guest.run(
            "until ! ls /run/ballast/writers/* /sys/fs/cgroup/ballast.slice/ballast-writer-* >/dev/null 2>&1;"
            " do sleep 0.1; done",
            timeout_s=60,
        )


@pytest.fixture
def writers(guest: Guest) -> Iterator[Writers]:
    guest.run(f"mkdir -p {FOLDER}; rm -f {FOLDER}/*; : >{LOG}; chmod 666 {LOG}")
    yield Writers(guest)
    guest.run(f"rm -f {FOLDER}/* {LOG}")


async def test_levels_and_users(vsock: str, token: str, guest: Guest, writers: Writers) -> None:
    writers.add("base", level="back-end", user="nobody")
    writers.add("shop", level="front-end")
    session_id = str(uuid.uuid4())
    async with Agent.connect(vsock, token=token) as agent:
        begun = await agent.quiesce_begin(session_id, LEASE_MS)
        ended = await agent.quiesce_end(session_id)
    assert begun.consistency == "application", begun.writers
    assert [(one.name, one.state) for one in begun.writers if one.state != "absent"] == [
        ("shop", "frozen"),
        ("base", "frozen"),
    ]
    assert (ended.held, ended.reason) == (True, None)
    writers.wait_gone()
    told = writers.told()
    assert [line for line in told if " identify " not in line and " p" not in line] == [
        "shop freeze root",
        "base freeze nobody",
        "base thaw nobody",
        "shop thaw root",
    ]
    assert sorted(line for line in told if " p" in line) == sorted(
        ["shop prepare root", "base prepare nobody", "base post nobody", "shop post root"]
    )


async def test_without_an_agent_they_are_aborted_in_order(
    vsock: str, token: str, guest: Guest, writers: Writers
) -> None:
    for name, level in (("shop", "front-end"), ("base", "back-end"), ("disk", "system")):
        writers.add(name, level=level)
    session_id = str(uuid.uuid4())
    async with Agent.connect(vsock, token=token) as agent:
        await agent.quiesce_begin(session_id, LEASE_MS)
    guest.run("systemctl kill -s KILL ballast-agent")
    ended = await _end(vsock, token, session_id)
    assert (ended.held, ended.reason) == (False, "agent-restarted")
    assert {one.name for one in ended.writers} == {"shop", "base", "disk"}
    writers.wait_gone()
    undone = [line.split()[:2] for line in writers.told() if line.split()[1] in ("thaw", "abort")]
    assert undone == [["disk", "abort"], ["base", "abort"], ["shop", "abort"]]


async def test_one_that_dies_frozen_breaks_the_hold(vsock: str, token: str, guest: Guest, writers: Writers) -> None:
    writers.add("base")
    session_id = str(uuid.uuid4())
    async with Agent.connect(vsock, token=token) as agent:
        await agent.quiesce_begin(session_id, LEASE_MS)
        guest.run("kill -9 $(head -1 /sys/fs/cgroup/ballast.slice/ballast-writer-base.service/cgroup.procs)")
        ended = await agent.quiesce_end(session_id)
    assert (ended.held, ended.reason) == (False, "writer-lost")
    writers.wait_gone()
    assert [line.split()[1] for line in writers.told()] == ["identify", "prepare", "freeze", "abort"]


async def test_what_cannot_be_frozen_a_dead_server_and_a_writer_that_hangs_are_all_named(
    vsock: str, token: str, guest: Guest, writers: Writers
) -> None:
    writers.add("stuck", freeze="sleep 600", critical=True, freeze_ms=2000)
    guest.put("/run/nfs_server.py", NFS.read_bytes())
    guest.put("/run/fat.img", FAT)
    guest.run("truncate -s 1440K /run/fat.img; mkdir -p /mnt/fat; mount -t vfat -o loop /run/fat.img /mnt/fat")
    try:
        guest.run(MOUNT_NFS, timeout_s=60)
        session_id = str(uuid.uuid4())
        started_s = time.monotonic()
        async with Agent.connect(vsock, token=token) as agent:
            with pytest.raises(DeadlineExceeded) as caught:
                await agent.quiesce_begin(session_id, LEASE_MS)
        assert time.monotonic() - started_s < 20
        for culprit in ("writer stuck", "/mnt/nfs (nfs cannot", "/mnt/fat (vfat"):
            assert culprit in caught.value.desc
    finally:
        guest.run(f"{UMOUNT_NFS}; umount /mnt/fat; rmdir /mnt/fat; rm /run/fat.img", timeout_s=60)
    writers.wait_gone()
    assert [line.split()[1] for line in writers.told()] == ["identify", "prepare", "freeze", "abort"]


async def test_one_is_configured_and_switched_off(vsock: str, token: str, guest: Guest, writers: Writers) -> None:
    writers.add("base", level="back-end")
    writers.add("shop")
    session_id = str(uuid.uuid4())
    with configured(guest, '[writer.base]\nuser = "nobody"\n[writer.shop]\nenabled = false\n'):
        async with Agent.connect(vsock, token=token) as agent:
            begun = await agent.quiesce_begin(session_id, LEASE_MS)
            await agent.quiesce_end(session_id)
    assert [one.name for one in begun.writers if one.state == "frozen"] == ["base"]
    writers.wait_gone()
    assert {line.split()[2] for line in writers.told()} == {"nobody"}


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
