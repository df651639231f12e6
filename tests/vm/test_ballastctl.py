"""ballastctl and the memory of a real guest: the host gets what the guest gives, whole chunks and whole DIMMs."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import ballast
from ballast.host.agent import Agent
from ballast.host.qmp import Qmp
from tests.lab.guest import Guest

MIB = 1 << 20
DEADLINE_S = 120.0
# Data, and then free memory that the host has pages for.
FILL = """
import os
os.makedirs("/run/filled", exist_ok=True)
os.system("mount -t tmpfs -o size=90% none /run/filled")
left = int(next(line for line in open("/proc/meminfo") if "MemAvailable" in line).split()[1]) >> 10
with open("/run/filled/data", "wb") as file:
    for _ in range(left - 150):
        file.write(os.urandom(4096) * 256)
os.system("umount /run/filled; rmdir /run/filled")
"""


@pytest.fixture
def config(guest: Guest, vsock: str, token: str, tmp_path: Path) -> Path:
    """host.toml that knows the guest."""
    token_file = tmp_path / "token"
    token_file.touch(mode=0o600)
    token_file.write_text(token)
    path = tmp_path / "host.toml"
    path.write_text(
        f'[vm.lab]\nagent = "{vsock}"\ntoken-file = "{token_file}"\nqmp = "unix:{guest.qmp_path}"\n'
        'safe-vhost-user = ["vsock"]\n'
    )
    return path


def command(config: Path, *words: str) -> list[str]:
    """Its command line."""
    return [sys.executable, "-m", "ballast.host.cli", *words, "lab", "--config", str(config), "--json"]


ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(ballast.__file__).parents[1])}


@pytest.fixture
def ctl(config: Path) -> Iterator[Callable[..., dict[str, Any]]]:
    """Run it to its end; what it tells. The balloon is empty afterwards."""

    def run(*words: str, options: tuple[str, ...] = (), status: int = 0) -> dict[str, Any]:
        argv = [*command(config, *words), *options]
        ended = subprocess.run(argv, capture_output=True, text=True, env=ENVIRONMENT, timeout=DEADLINE_S, check=False)
        assert ended.returncode == status, ended.stderr
        told: dict[str, Any] = json.loads(ended.stdout)
        return told

    yield run
    run("balloon", "set", "0")


async def backing_bytes(guest: Guest) -> int:
    """What the guest's boot memory takes on this host, by the file's own count."""
    async with Qmp.connect(str(guest.qmp_path)) as qmp:
        links = [path for path in Path(f"/proc/{qmp.pid}/fd").iterdir() if "memfd:memory" in str(path.readlink())]
        files = [path.stat() for path in links]
    return max((about.st_size, 512 * about.st_blocks) for about in files)[1]


async def test_what_the_guest_gives_is_the_hosts_and_comes_back(
    guest: Guest, ctl: Callable[..., dict[str, Any]], measured: Callable[[str], None]
) -> None:
    await asyncio.to_thread(guest.run, ["/usr/bin/python3", "-c", FILL], timeout_s=DEADLINE_S)
    before_bytes = await backing_bytes(guest)
    told = await asyncio.to_thread(ctl, "balloon", "set", "256M")
    fallen_bytes = before_bytes - await backing_bytes(guest)
    measured(f"256 MiB ballooned: {told['freed-bytes']} bytes measured as freed, the file has {fallen_bytes} less")
    assert (told["total-bytes"], told["not-zero-bytes"]) == (256 * MIB, 0)
    assert told["punched-bytes"] == 256 * MIB
    assert told["freed-bytes"] >= 250 * MIB
    # Meanwhile the guest runs on, and takes pages that it never had.
    assert fallen_bytes >= 200 * MIB
    shown = await asyncio.to_thread(ctl, "balloon", "show")
    assert shown["balloon"]["total-bytes"] == 256 * MIB
    told = await asyncio.to_thread(ctl, "balloon", "set", "0")
    assert (told["given-back-bytes"], told["total-bytes"]) == (256 * MIB, 0)
    await asyncio.to_thread(guest.run, ["/usr/bin/python3", "-c", FILL], timeout_s=DEADLINE_S)


@contextlib.asynccontextmanager
async def inflating(config: Path, agent: Agent, size: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """A ballastctl that has the guest's second chunk in hand."""
    await agent.subscribe(["BALLAST_BALLOON"])
    process = await asyncio.create_subprocess_exec(
        *command(config, "balloon", "set", size), env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        async with asyncio.timeout(DEADLINE_S):
            events = agent.events()
            for _ in range(2):
                while (await anext(events)).data["cause"] != "inflate":
                    pass
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_a_signal_leaves_a_whole_number_of_chunks(
    vsock: str, token: str, config: Path, ctl: Callable[..., dict[str, Any]], number: signal.Signals
) -> None:
    async with Agent.connect(vsock, token) as agent:
        async with inflating(config, agent, "400M") as process:
            process.send_signal(number)
            out, err = await asyncio.wait_for(process.communicate(), DEADLINE_S)
        told = json.loads(out)
        assert (process.returncode, told["stopped"]) == (128 + number, "interrupted"), err
        assert told["punched-bytes"] == told["taken-bytes"] == told["total-bytes"]
        assert told["total-bytes"] % (64 * MIB) == 0
        again = await agent.balloon_inflate(told["total-bytes"])
        assert (again.chunk, again.total_bytes) == (None, told["total-bytes"])


async def test_a_chunk_that_was_in_a_killed_hand_is_the_next_ones(
    vsock: str, token: str, config: Path, ctl: Callable[..., dict[str, Any]]
) -> None:
    async with Agent.connect(vsock, token) as agent:
        async with inflating(config, agent, "400M") as process:
            process.kill()
            await asyncio.wait_for(process.wait(), DEADLINE_S)
        told = await asyncio.to_thread(ctl, "balloon", "set", "320M")
        assert (told["total-bytes"], told["not-zero-bytes"]) == (320 * MIB, 0)
        again = await agent.balloon_inflate(320 * MIB)
        assert (again.chunk, again.total_bytes) == (None, 320 * MIB)


async def test_memory_comes_and_goes_whole(
    guest: Guest, vsock: str, token: str, ctl: Callable[..., dict[str, Any]]
) -> None:
    async with Agent.connect(vsock, token) as agent:
        before = (await agent.memory_status()).blocks
        added = await asyncio.to_thread(ctl, "memory", "add", "256M")
        blocks: list[dict[str, Any]] = added["blocks"]
        assert [one["zone"] for one in blocks] == ["movable"] * 2
        assert (await agent.memory_status()).blocks.online == before.online + 2
        # QEMU must not keep the DIMM later because it was asked, with it in place, where the guest's memory is.
        await asyncio.to_thread(ctl, "balloon", "set", "64M")
        # No time for it: it stays, whole.
        options = ("--offline-timeout", "1ms")
        told = await asyncio.to_thread(ctl, "memory", "remove", "256M", options=options, status=1)
        (kept,) = told["dimms"]
        assert kept["result"] == "failed"
        assert kept["reason"].startswith("block ")
        assert (await agent.memory_status()).blocks.online == before.online + 2
        await asyncio.to_thread(ctl, "balloon", "set", "0")
        removed = await asyncio.to_thread(ctl, "memory", "remove", "256M")
        assert removed["bytes"] == 256 * MIB
        await asyncio.to_thread(guest.bury, 256 * MIB)
        assert (await agent.memory_status()).blocks == before
    assert await asyncio.to_thread(guest.qmp, "query-memory-devices") == []
