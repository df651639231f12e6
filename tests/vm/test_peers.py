"""What peers can make the agent do, and what they cannot: use it up, hold it up, put it out of step."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from ballast.host.agent import Agent
from ballast.host.connect import open_streams, parse_target
from ballast.wire.errors import AgentError
from ballast.wire.memory_names import DemandInterval
from tests.lab.guest import Guest
from tests.vm.raw import Raw, request
from tests.vm.unit import configured, usage

PEERS, PINGS, FIRST_PINGS = 10, 10_000, 1_000
MAX_GROWTH_BYTES = 1 << 20
PROMPT_S = 2.0
TIDIED_S = 2.0
DEADLINE_S = 60.0
GARBAGE_LINES, BATCH_LINES = 1500, 50

# What the mutations begin with. Nothing here changes the guest, whatever becomes of it.
CORPUS = [
    request("guest-sync", id=1),
    request("guest-sync-delimited", id=2),
    request("guest-ping"),
    request("guest-info"),
    request("ballast-agent-status"),
    request("guest-fsfreeze-status"),
    request("guest-get-memory-block-info"),
    request("ballast-subscribe", events=["BALLAST_QUIESCE"]),
    b'{"execute": "guest-ping", "arguments": {}, "id": {"a": [1.5e3, null, true, "\\u00e9\\"\\\\"]}}\n',
    b"{'execute': 'guest-ping'}{'execute': 'guest-ping'}\n",
    b"\xff\n\n",
    b"[" * 3000 + b"\n",
]


async def ping_pipelined(target: str, count: int) -> None:
    """Send all pings at once, and see all answers come in their order."""
    reader, writer = await open_streams(parse_target(target))
    try:
        writer.write(b"".join(b'{"execute": "guest-ping", "id": %d}\n' % number for number in range(count)))
        expected = b"".join(b'{"return": {}, "id": %d}\n' % number for number in range(count))
        assert await reader.readexactly(len(expected)) == expected
    finally:
        writer.transport.abort()


async def ping_from_many(target: str, count: int) -> float:
    """Have all peers ping at once; returns the seconds it took."""
    started_s = time.monotonic()
    async with asyncio.timeout(4 * DEADLINE_S):
        await asyncio.gather(*(ping_pipelined(target, count) for _ in range(PEERS)))
    return time.monotonic() - started_s


def wait_alone(target: str) -> None:
    """Wait until nobody but ourselves is connected, and then until what the others left is given back."""
    deadline_s = time.monotonic() + DEADLINE_S
    with Raw(target) as raw:
        while raw.ask("ballast-agent-status")["return"]["peers"] > 1:
            assert time.monotonic() < deadline_s, "peers that have gone are still counted"
    time.sleep(TIDIED_S)


async def test_many_pipelined_pings_leave_neither_memory_nor_descriptors_behind(
    guest: Guest, vsock: str, measured: Callable[[str], None]
) -> None:
    await ping_from_many(vsock, FIRST_PINGS)
    wait_alone(vsock)
    before = usage(guest)
    took_s = await ping_from_many(vsock, PINGS)
    wait_alone(vsock)
    after = usage(guest)
    growth_bytes = after.rss_bytes - before.rss_bytes
    grown = f"of {before.rss_bytes >> 10} KiB grown by {growth_bytes >> 10}"
    measured(f"{PEERS} x {PINGS} pings over vsock: {took_s:.1f} s; {grown}")
    assert after.pid == before.pid
    assert growth_bytes < MAX_GROWTH_BYTES
    assert after.descriptors == before.descriptors


async def test_a_flood_of_pings_holds_up_no_other_peer(vsock: str, measured: Callable[[str], None]) -> None:
    flood = asyncio.create_task(ping_from_many(vsock, FIRST_PINGS))
    async with Agent.connect(vsock) as other:
        worst_s = 0.0
        while not flood.done():
            started_s = time.monotonic()
            await other.guest_ping()
            worst_s = max(worst_s, time.monotonic() - started_s)
    measured(f"beside {PEERS} floods: ping {1000 * worst_s:.0f} ms at most")
    assert worst_s < PROMPT_S
    await flood


async def test_a_subscriber_that_never_reads_is_dropped_while_others_go_on(
    guest: Guest, vsock: str, token: str, measured: Callable[[str], None]
) -> None:
    # Kernels and vsock daemon hold half a megabyte between us: answers fill that, so that the events queue up.
    fill = request("guest-info") * 2000
    with configured(guest, "[limits]\nqueue-bytes = 65536\n"), Raw(vsock) as deaf:
        deaf.ask("ballast-authenticate", token=token)
        async with Agent.connect(vsock, token) as other, asyncio.timeout(DEADLINE_S):
            await other.subscribe([], demand=DemandInterval(100))
            before = usage(guest)
            deaf.send(request("ballast-subscribe", events=[], demand={"interval-ms": 100}) + fill)
            events = other.events()
            while (await other.status()).peers > 1:
                assert (await anext(events)).name == "BALLAST_DEMAND"
        after = usage(guest)
        growth_bytes = after.rss_bytes - before.rss_bytes
        measured(f"a deaf peer: of {before.rss_bytes >> 10} KiB grown by {growth_bytes >> 10}")
        assert growth_bytes < MAX_GROWTH_BYTES
        said = guest.run(["journalctl", f"_PID={after.pid}", "--output=cat"]).stdout
        assert "does not read its events, dropped" in said
        assert said.count("\n") < 20, "dropped, and still answered"


@contextmanager
def stuck_disk(guest: Guest) -> Iterator[str]:
    """A file system with something to write out, on a disk that does not move until the context is left."""
    guest.run(
        """
        modprobe -a loop dm_mod
        truncate -s 64M /run/slow.img
        loop=$(losetup --show --find /run/slow.img)
        dmsetup create slow --table "0 131072 linear $loop 0"
        mkfs.ext4 -q /dev/mapper/slow
        mkdir -p /mnt/slow
        mount /dev/mapper/slow /mnt/slow
        dd if=/dev/zero of=/mnt/slow/dirty bs=1M count=4 status=none
        dmsetup suspend --noflush --nolockfs slow
        setsid sh -c 'sleep 100; dmsetup resume slow' </dev/null >/dev/null 2>&1 &
        """
    )
    try:
        yield "/mnt/slow"
    finally:
        guest.run("dmsetup resume slow; umount /mnt/slow; dmsetup remove slow")
        guest.run("losetup --detach-all; rm -r /run/slow.img /mnt/slow")


async def test_a_slow_command_holds_up_neither_pings_nor_thaws_of_other_peers(
    guest: Guest, vsock: str, token: str, measured: Callable[[str], None]
) -> None:
    with stuck_disk(guest) as mountpoint:
        async with Agent.connect(vsock, token) as slow, Agent.connect(vsock, token) as other:
            begin = asyncio.create_task(slow.quiesce_begin("stuck", 60_000, mountpoints=[mountpoint]))
            async with asyncio.timeout(DEADLINE_S):
                while (await other.quiesce_status()).id != "stuck":
                    assert not begin.done()
            worst_s = 0.0
            for _ in range(50):
                started_s = time.monotonic()
                await other.guest_ping()
                worst_s = max(worst_s, time.monotonic() - started_s)
            assert not begin.done(), "nothing was slow"
            started_s = time.monotonic()
            with pytest.raises(AgentError):  # nothing was frozen yet
                await other.quiesce_end("stuck")
            end_s = time.monotonic() - started_s
            with pytest.raises(AgentError):
                await begin
    measured(f"beside a freeze that waits: ping {1000 * worst_s:.0f} ms at most, end {1000 * end_s:.0f} ms")
    assert max(worst_s, end_s) < PROMPT_S


def garble(dice: random.Random) -> bytes:
    """A line or two of the corpus, with some bytes put in, taken out, doubled or swapped."""
    line = bytearray(dice.choice(CORPUS))
    if dice.random() < 0.2:
        line = line[:-1] + dice.choice(CORPUS)
    for _ in range(dice.choice((0, 1, 1, 2, 8))):
        at, to = sorted(dice.randrange(len(line) + 1) for _ in range(2))
        to = min(to, at + 12)
        change = dice.choice(("noise", "cut", "double", "structure"))
        if change == "noise":
            line[at:to] = dice.randbytes(to - at)
        elif change == "cut":
            del line[at:to]
        elif change == "double":
            line[at:at] = line[at:to]
        else:
            line[at:at] = dice.choice((b"{", b"}", b"[", b"]", b'"', b"'", b"\\", b"\n", b"\xff", b"\0", b"1e999"))
    return bytes(line)


@pytest.mark.parametrize("transport", ["vsock", "serial"])
def test_garbage_neither_ends_the_agent_nor_leaves_the_stream_out_of_step(
    guest: Guest, vsock: str, serial: str, transport: str
) -> None:
    dice = random.Random(2)
    pid = usage(guest).pid
    answers = 0
    with Raw(vsock if transport == "vsock" else serial) as raw:
        for _ in range(GARBAGE_LINES // BATCH_LINES):
            data = b"".join(garble(dice) for _ in range(BATCH_LINES))
            for line in raw.exchange(data):
                answer = json.loads(line.lstrip(b"\xff"))
                assert "return" in answer or answer["error"]["desc"] != "internal error, see the guest's journal", data
                answers += 1
        assert raw.ask("guest-sync", id=5) == {"return": 5}
    assert answers > GARBAGE_LINES // 2
    assert usage(guest).pid == pid
