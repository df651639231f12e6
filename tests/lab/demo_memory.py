"""The demo's memory: pressure arrives as an event, and memory that is plugged in is online before anybody asks."""

import asyncio
import struct
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ballast.host.agent import Agent
from ballast.wire.memory_names import PsiTrigger
from ballast.wire.message import Event
from tests.lab.demo_stage import DemoFailed, GuestClock, Stage, read_clock, require
from tests.lab.guest import Guest

PROGRAM, LOG = "/run/demo/load.py", "/run/demo/stalls"
LOAD_UNIT = "ballast-demo-load"
FILE = "/mnt/data0/ballast-demo-load"
SPARE_BYTES, FILE_BYTES = 120 << 20, 300 << 20
TRIGGER = PsiTrigger("some", stall_us=150_000, window_us=1_000_000)
PRESSURE_EVENTS = 4
EVENT_TIMEOUT_S = 60
# From the stall to the event: a window is looked at ten times, and the machine may be busy.
DELAY_MAX_S = 2.0
DIMM_BYTES = 512 << 20
ONLINE_TIMEOUT_S = 30
# How long the relief is looked at: until the readers have their pages again, and then.
SETTLE_S, RELIEF_S = 3.0, 3.0

# (CLOCK_REALTIME of the guest in seconds, microseconds that some task has waited for memory)
Sample = tuple[float, int]


@dataclass(frozen=True, slots=True)
class Heard:
    """An event, and when it was here, by the host's clock."""

    at_s: float
    event: Event

    @property
    def sent_s(self) -> float:
        """When the agent made it, by the guest's clock."""
        return self.event.timestamp_us / 1e6


def mib(bytes_: int) -> str:
    """Whole MiB."""
    return f"{bytes_ / (1 << 20):.0f} MiB"


class Ear:
    """The events of a connection. One after the other; those that nobody waits for are dropped."""

    def __init__(self, agent: Agent) -> None:
        self._events: AsyncIterator[Event] = agent.events()

    async def next(self, name: str, timeout_s: float) -> Heard:
        """Return the next event of that name. DemoFailed if there is none in time."""
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    heard = Heard(event=await anext(self._events), at_s=time.time())
                    if heard.event.name == name:
                        return heard
        except TimeoutError:
            raise DemoFailed(f"no {name} within {timeout_s:.0f} s") from None


def start_load(guest: Guest) -> None:
    """Start the load, in a unit that the OOM killer would take first."""
    guest.put(PROGRAM, Path(__file__).with_name("demo_load.py").read_bytes())
    guest.run(
        f"systemd-run --quiet --unit={LOAD_UNIT} --property=OOMScoreAdjust=500 /usr/bin/python3 -IB "
        f"{PROGRAM} {SPARE_BYTES} {FILE_BYTES} {FILE} {LOG}"
    )


def stop_load(guest: Guest) -> None:
    """End the load, having seen that it still runs and that nobody was killed for memory."""
    state = guest.run(["systemctl", "show", "--property=ActiveState", "--value", LOAD_UNIT]).stdout.strip()
    require(state == "active", f"the load has died: its unit is {state}")
    killed = guest.run("sed -n 's/^oom_kill //p' /proc/vmstat").stdout.strip()
    require(killed == "0", f"the OOM killer has taken {killed} processes")
    guest.run(["systemctl", "stop", LOAD_UNIT])


def read_samples(guest: Guest) -> list[Sample]:
    """What the load's second process has written down so far."""
    log = guest.get(LOG)
    return list(struct.iter_unpack("dq", log[: len(log) // 16 * 16]))


def first_crossing_s(samples: Sequence[Sample], trigger: PsiTrigger) -> float:
    """When the stalls of the last window first reached the trigger's; DemoFailed if they never did."""
    window: deque[Sample] = deque()
    for now_s, total_us in samples:
        window.append((now_s, total_us))
        while window[0][0] < now_s - trigger.window_us / 1e6:
            window.popleft()
        if total_us - window[0][1] >= trigger.stall_us:
            return now_s
    raise DemoFailed("an event, but the guest's own stall total did not reach the trigger")


def stalled_percent(samples: Sequence[Sample], from_s: float, to_s: float) -> float:
    """Share of that time in which some task waited for memory."""
    within = [sample for sample in samples if from_s <= sample[0] <= to_s]
    require(len(within) > 1, "the guest has measured no stalls")
    (first_s, first_us), (last_s, last_us) = within[0], within[-1]
    return (last_us - first_us) / (last_s - first_s) / 1e4


async def show_pressure(stage: Stage, ear: Ear, clock: GuestClock) -> None:
    """The load starts and the guest tells of it."""
    guest, agent, screen = stage.guest, stage.agent, stage.screen
    before = await agent.memory_status()
    await agent.subscribe(events=["BALLAST_PRESSURE", "BALLAST_MEMORY_ADDED"], psi=[TRIGGER])
    screen.say(
        f"Before: [bold]{mib(before.available_bytes)}[/] of {mib(before.total_bytes)} available, level {before.level}."
    )
    screen.say(
        f"We subscribe on vsock to pressure: some task waits for memory {TRIGGER.stall_us / 1000:.0f} ms in "
        f"{TRIGGER.window_us / 1e6:.0f} s. Then a program takes all but {mib(SPARE_BYTES)} and keeps reading "
        f"{mib(FILE_BYTES)} of disk."
    )
    with screen.working("waiting for BALLAST_PRESSURE"):
        await asyncio.to_thread(start_load, guest)
        first = await ear.next("BALLAST_PRESSURE", EVENT_TIMEOUT_S)
    crossed_s = first_crossing_s(await asyncio.to_thread(read_samples, guest), TRIGGER)
    delay_s, way_s = first.sent_s - crossed_s, first.at_s - clock.on_host(first.sent_s)
    screen.say(
        f"BALLAST_PRESSURE, level [bold]{first.event.data['level']}[/]: made [bold]{1000 * delay_s:.0f} ms[/] after "
        f"the stalls reached the mark, here {1000 * way_s:.1f} ms later (±{1000 * clock.error_s:.1f} ms, two clocks)."
    )
    require(abs(delay_s) < DELAY_MAX_S, f"the event came {delay_s:.1f} s after what it tells of")
    require(-clock.error_s - 0.005 < way_s < DELAY_MAX_S, f"the event was on its way for {way_s:.1f} s")
    screen.sum_up("pressure event", f"{1000 * delay_s:.0f} ms after the stalls, {1000 * way_s:.0f} ms on the way")
    await _follow(stage, ear)


async def _follow(stage: Stage, ear: Ear) -> None:
    """It goes on: an event for each window."""
    with stage.screen.working("it goes on, an event a second"):
        for _ in range(PRESSURE_EVENTS):
            data: dict[str, Any] = (await ear.next("BALLAST_PRESSURE", EVENT_TIMEOUT_S)).event.data
            stage.screen.say(
                f"BALLAST_PRESSURE, level {data['level']}: of the last 10 s some task waited "
                f"{data['some-avg10']:.0f} %, all of them {data['full-avg10']:.0f} %."
            )


async def show_hot_add(stage: Stage, ear: Ear) -> None:
    """A DIMM under that load; the agent onlines it."""
    guest, agent, screen = stage.guest, stage.agent, stage.screen
    before = await agent.memory_status()
    wanted = DIMM_BYTES // before.blocks.size_bytes
    with screen.working("waiting for BALLAST_MEMORY_ADDED"):
        clock = await asyncio.to_thread(read_clock, guest)
        plugged_s = time.time()
        added, _ = await asyncio.gather(
            _hear_added(ear, wanted), asyncio.to_thread(guest.hot_add, DIMM_BYTES, "dimm-demo")
        )
    blocks = [block for heard in added for block in heard.event.data["blocks"]]
    online_s, here_s = clock.on_host(added[-1].sent_s) - plugged_s, added[-1].at_s - plugged_s
    after = await agent.memory_status()
    require(all(block["result"] == "done" for block in blocks), f"not all blocks are online: {blocks}")
    require(after.total_bytes - before.total_bytes == DIMM_BYTES, f"MemTotal grew from {before.total_bytes} to {after}")
    zones = ", ".join(sorted({block["zone"] for block in blocks}))
    for block in blocks:
        screen.say(f"Block {block['phys-index']}: zone {block['zone']}, online in {block['online-us'] / 1000:.1f} ms.")
    screen.say(
        f"From device_add to all {len(blocks)} blocks online: [bold]{1000 * online_s:.0f} ms[/], to the event here "
        f"{1000 * here_s:.0f} ms. MemTotal {mib(before.total_bytes)} -> [bold]{mib(after.total_bytes)}[/]."
    )
    screen.sum_up("512 MiB hot-added", f"{1000 * online_s:.0f} ms to {len(blocks)} blocks online, zone {zones}")
    await _show_relief(stage, added[-1].sent_s)


async def _hear_added(ear: Ear, wanted: int) -> list[Heard]:
    """The events that tell of that many blocks."""
    added: list[Heard] = []
    while sum(len(heard.event.data["blocks"]) for heard in added) < wanted:
        added.append(await ear.next("BALLAST_MEMORY_ADDED", ONLINE_TIMEOUT_S))
    return added


async def _show_relief(stage: Stage, online_s: float) -> None:
    """What the new memory is good for: the same load, without the waiting. `online_s` is by the guest's clock."""
    with stage.screen.working("the load goes on, with the new memory"):
        await asyncio.sleep(SETTLE_S + RELIEF_S)  # a share of time is what is measured here
    samples = await asyncio.to_thread(read_samples, stage.guest)
    before = stalled_percent(samples, online_s - RELIEF_S, online_s)
    after = stalled_percent(samples, online_s + SETTLE_S, online_s + SETTLE_S + RELIEF_S)
    await asyncio.to_thread(stop_load, stage.guest)
    stage.screen.say(
        f"The same load, waiting for memory: {before:.0f} % of the time in the {RELIEF_S:.0f} s before, "
        f"[bold]{after:.0f} %[/] after. Nobody was killed; the load ends here."
    )
    stage.screen.sum_up("waiting for memory", f"{before:.0f} % of the time before it, {after:.0f} % after")
