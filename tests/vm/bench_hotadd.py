"""Memory that is plugged in, until it is online: by our agent, by a udev rule, and by the kernel itself.

The same program in the guest listens to the kernel in all cases (bench_watch.py): the first block's "add" begins it,
the last block's "online" ends it. All go to the movable zone, so that the DIMM can be taken out again for the next.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from tests.lab.demo_stage import GuestClock, read_clock
from tests.lab.guest import QmpError
from tests.vm.bench_machine import BLOCK_BYTES, TIMEOUT_S, WATCH, BenchFailed, Machine
from tests.vm.bench_memory_figures import BALLAST, KERNEL, UDEV

RULES = "/run/udev/rules.d/99-bench.rules"
# As distributions have it (40-vm-hotadd.rules, 40-redhat.rules), but for the zone.
RULE = 'SUBSYSTEM=="memory", ACTION=="add", ATTR{state}=="offline", ATTR{state}="online_movable"\n'
READY = "/run/bench-watch.ready"
# Blocks that are no boot memory, with the shell's own means.
_OFFLINE = """
for block in /sys/devices/system/memory/memory[0-9]*; do
    read -r zone <$block/valid_zones
    [ "$zone" != Movable ] || echo offline >$block/state
done
"""


@dataclass(slots=True)
class Heard:
    """What the kernel said of blocks, by the host's clock in seconds; and when the host gave the order."""

    clock: GuestClock
    ordered_s: float = 0.0
    added_s: list[float] = field(default_factory=list)
    online_s: list[float] = field(default_factory=list)

    def order_now(self) -> None:
        """The order is given, the last one counts."""
        self.ordered_s = time.time()

    def on_host(self, guest_s: float) -> float:
        """A moment of the guest's by the host's clock."""
        return self.clock.on_host(guest_s)

    @property
    def first_to_last_ms(self) -> float:
        """From the first block that is seen to the last one that is online."""
        return 1000 * (self.online_s[-1] - self.added_s[0])

    @property
    def from_order_ms(self) -> float:
        """From the order to the last block that is online."""
        return 1000 * (self.online_s[-1] - self.ordered_s)


@contextmanager
def listening(machine: Machine, blocks: int) -> Iterator[Heard]:
    """The order is given in the block of code; after it, so many memory blocks are online and Heard is whole."""
    guest = machine.guest
    with ThreadPoolExecutor(1) as pool:
        program = ["/usr/bin/python3", "-IB", WATCH, str(blocks), READY]
        running = pool.submit(guest.run, program, timeout_s=TIMEOUT_S)
        guest.run(f"until [ -e {READY} ]; do sleep 0.05; done; rm {READY}; udevadm settle", timeout_s=TIMEOUT_S)
        heard = Heard(read_clock(guest))
        heard.order_now()
        yield heard
        told = json.loads(running.result().stdout)
    heard.added_s = [heard.on_host(at_s) for at_s in told["added"]]
    heard.online_s = [heard.on_host(at_s) for at_s in told["online"]]


def measure_hotadd(machine: Machine, contender: str, blocks: int) -> list[dict[str, Any]]:
    """One DIMM comes and goes."""
    with _turn(machine, contender), listening(machine, blocks) as heard:
        plug(machine, blocks)
    unplug(machine, blocks)
    if len(heard.added_s) != blocks:
        raise BenchFailed(f"{len(heard.added_s)} blocks were added, not {blocks}")
    from_order = round(heard.from_order_ms, 3)
    return [{"measure": f"hotadd-{blocks}", "ms": round(heard.first_to_last_ms, 3), "from_order_ms": from_order}]


@contextmanager
def _turn(machine: Machine, contender: str) -> Iterator[None]:
    """It is this one's business to bring blocks online."""
    guest = machine.guest
    if contender == BALLAST:
        machine.start_agent()
        yield
        machine.stop_agent()
    elif contender == UDEV:
        guest.put(RULES, RULE.encode())
        guest.run("udevadm control --reload")
        yield
        guest.run(f"rm {RULES}; udevadm control --reload")
    elif contender == KERNEL:
        machine.let_kernel("online_movable")
        yield
        machine.let_kernel("offline")


def plug(machine: Machine, blocks: int) -> None:
    """Put in a DIMM. Its memory in QEMU is kept from one time to the next: making it anew takes time, and bury()."""
    guest = machine.guest
    backend = f"memory-{blocks}"
    if backend not in {one["name"] for one in guest.qmp("qom-list", path="/objects")}:
        size_bytes = blocks * BLOCK_BYTES
        guest.qmp("object-add", qom_type="memory-backend-memfd", id=backend, size=size_bytes, share=True, reserve=False)
    guest.qmp("device_add", driver="pc-dimm", id=f"dimm-{blocks}", memdev=backend)


def unplug(machine: Machine, blocks: int) -> None:
    """Take it out again."""
    guest = machine.guest
    guest.run(_OFFLINE, timeout_s=TIMEOUT_S)
    guest.qmp("device_del", id=f"dimm-{blocks}")
    try:
        while guest.wait_qmp_event("DEVICE_DELETED").get("device") != f"dimm-{blocks}":
            pass
    except (TimeoutError, QmpError) as error:
        raise BenchFailed("the DIMM does not come off") from error
