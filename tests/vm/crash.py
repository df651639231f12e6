"""Snapshots of a guest whose databases and files are being written: python -m tests.vm.crash [--count N] ...

Two guests. In the first PostgreSQL, MariaDB and plain writers write on three file systems, and tell the host of each
write that is done (crash_load.py). Ten times, at moments that the seed decides, it is frozen, snapshotted and thawed.
Then a fresh guest gets throw-away copies of these ten, one after the other (crash_check.py). A cycle fails if

- a transaction or a write is missing that the host had heard of before the snapshot was taken, or one before that;
- a file system is not clean once it was mounted, a deleted file shows, or a server does not start on what it finds;
- the freeze did not cover all three or did not hold.

Results are lines of JSON; cycles of the same commit and seed that the file of results has already are not run again, so
a campaign that was interrupted goes on. The figures at the end are sums over all that is in it of this commit. With
--without-freeze or --hasty-commits it must fail: the exit status is 1 if a cycle did.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from tests.lab.guest import Guest
from tests.lab.image import build
from tests.vm.conftest import TOKEN, boot
from tests.vm.crash_loaded import IN_GUEST, Loaded, Snapshot, loaded
from tests.vm.faults import commit, read_results

HERE = Path(__file__).parent
PROGRAMS = ("crash_load.py", "crash_check.py")
SNAPSHOTS_PER_BOOT = 10
# The server's disks, by number: in three boots of the checker each has been on two of three types.
LAYOUTS: tuple[dict[str, int], ...] = (
    {"postgresql": 0, "mariadb": 1},
    {"postgresql": 1, "mariadb": 2},
    {"postgresql": 2, "mariadb": 0},
)
PAUSE_MAX_S = 1.5
CHECK_TIMEOUT_S = 400
SCSI = ("-device", "virtio-scsi-pci,id=scsi")

Result = dict[str, Any]


# The fresh guest


@contextmanager
def checker() -> Iterator[Guest]:
    """Start a guest that shall look at snapshots; it still has to wait_boot()."""
    with Guest(build("trixie"), vsock=False, arguments=SCSI) as guest:
        yield guest


def check(guest: Guest, snapshot: Snapshot, load: Loaded) -> Result:
    """What crash_check.py finds in a snapshot, by disk."""
    for program in PROGRAMS:
        guest.put(f"{IN_GUEST}/tests/vm/{program}", (HERE / program).read_bytes())
    disks = {  # by SCSI target
        number: {"name": disk.name, "type": disk.type, "servers": load.servers[disk.name]}
        for number, disk in enumerate(load.guest.disks)
    }
    # One snapshot at a time: several file systems of the same identity would be mixed up, btrfs' above all.
    with ExitStack() as stack:
        for target, disk in enumerate(load.guest.disks):
            stack.enter_context(_attached(guest, target, disk.name, *snapshot.images[disk.name]))
        script = f"cd {IN_GUEST}; LC_ALL=C.UTF-8 /usr/bin/python3 -B -m tests.vm.crash_check '{json.dumps(disks)}'"
        found: Result = json.loads(guest.run(script, timeout_s=CHECK_TIMEOUT_S).stdout)
    return found


@contextmanager
def _attached(guest: Guest, target: int, name: str, image: Path, format_: str) -> Iterator[None]:
    """Plug in a throw-away copy of a disk's image."""
    copy = guest.dir / f"{name}.qcow2"
    backing = ["-b", str(image), "-F", format_]
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *backing, str(copy)], check=True, capture_output=True)
    file = {"driver": "file", "filename": str(copy)}
    guest.qmp("blockdev-add", driver="qcow2", node_name=name, file=file, cache={"no-flush": True})
    guest.qmp("device_add", driver="scsi-hd", bus="scsi.0", scsi_id=target, drive=name, id=f"disk-{name}")
    yield
    guest.qmp("device_del", id=f"disk-{name}")
    while guest.wait_qmp_event("DEVICE_DELETED").get("device") != f"disk-{name}":
        pass
    guest.qmp("blockdev-del", node_name=name)
    copy.unlink()


# A cycle


def take(load: Loaded, dice: random.Random, *, is_frozen: bool = True) -> Snapshot:
    """A snapshot at some moment, when all writers are at it."""
    load.wait_progress()
    time.sleep(dice.uniform(0, PAUSE_MAX_S))  # a moment that nobody chose
    return asyncio.run(load.snapshot(TOKEN)) if is_frozen else load.cut()


def judge(snapshot: Snapshot, found: Result) -> list[str]:
    """All that is wrong with a snapshot and what is in it."""
    complaints = _judge_freeze(snapshot)
    last = {writer: number for disk in found.values() for writer, number in disk["last"].items()}
    for writer, number in snapshot.acknowledged.items():
        if (there := last.get(writer, -1)) < number:
            complaints.append(f"{writer}: {number - there} lost, {there} of {number} are there")
    for name, disk in found.items():
        if "failed" in disk:
            complaints.append(f"{name}: {disk['failed']}")
        if disk["after"]:
            complaints.append(f"{name}: not clean: {disk['said']}")
        if disk["deleted"]:
            complaints.append(f"{name}: the deleted file is back")
        complaints += [f"{writer}: not all before its last write is there" for writer in disk["torn"]]
    return complaints


def _judge_freeze(snapshot: Snapshot) -> list[str]:
    if snapshot.began is None or snapshot.ended is None:
        return []
    states = {one.mountpoint: one.state for one in snapshot.began.filesystems}
    complaints = [
        f"{name}: {states.get(f'/mnt/{name}')}" for name in snapshot.images if states.get(f"/mnt/{name}") != "frozen"
    ]
    if not snapshot.ended.held:
        complaints.append(f"it did not hold: {snapshot.ended.reason}")
    return complaints


def describe(snapshot: Snapshot, found: Result) -> Result:
    """A cycle's line in the results."""
    began, ended = snapshot.began, snapshot.ended
    freeze: Result = {}
    if began and ended:
        writers = {one.name: one.state for one in began.writers if one.state != "absent"}
        freeze = {"consistency": began.consistency, "writers": writers, "freeze_ms": began.freeze_ms}
        freeze["held_ms"] = ended.held_ms
    complaints = judge(snapshot, found)
    statuses = {name: [disk["before"], disk["after"]] for name, disk in found.items()}
    return {**freeze, "acknowledged": snapshot.acknowledged, "fsck": statuses, "complaints": complaints}


# The campaign


def run_boot(load: Loaded, numbers: Sequence[int], options: argparse.Namespace) -> Iterator[Result]:
    """So many cycles and one boot of the checker."""
    layout = LAYOUTS[numbers[0] // SNAPSHOTS_PER_BOOT % len(LAYOUTS)]
    load.begin(layout, is_hasty=options.hasty_commits)
    dices = [random.Random(f"{options.seed} {number}") for number in numbers]
    snapshots = [take(load, dice, is_frozen=not options.without_freeze) for dice in dices]
    load.wait_progress()
    types = {server: load.guest.disks[index].type for server, index in layout.items()}
    with load.paused(), checker() as fresh:
        fresh.wait_boot()
        for number, snapshot in zip(numbers, snapshots, strict=True):
            started_s = time.monotonic()
            result = describe(snapshot, check(fresh, snapshot, load))
            yield {"cycle": number, **types, **result, "check_s": round(time.monotonic() - started_s, 1)}
    load.merge()


def summary(results: Sequence[Result]) -> str:
    """The figures of one commit."""
    failed = [result for result in results if result["complaints"]]
    complaints = [text for result in failed for text in result["complaints"]]
    rows = sum(
        sum(number for name, number in result["acknowledged"].items() if not name.startswith("file"))
        for result in results
    )
    return "\n".join(
        [
            *(f"cycle {one['cycle']} of seed {one['seed']}: {text}" for one in failed for text in one["complaints"]),
            f"{len(results)} cycles, {len(failed)} failed; {rows} acknowledged transactions looked for in "
            f"{3 * len(results)} file systems: "
            f"{sum(' lost, ' in text for text in complaints)} writers lost any, "
            f"{sum('not clean' in text for text in complaints)} file systems unclean; "
            f"{sum(one.get('consistency') == 'application' for one in results)} snapshots with both servers' consent",
        ]
    )


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.vm.crash", description=__doc__)
    parser.add_argument("--count", type=int, default=100, help="cycles in all, with those of --results (100)")
    parser.add_argument("--seed", type=int, default=1, help="decides when snapshots are taken (1)")
    parser.add_argument("--results", type=Path, help="the file to which results are appended")
    parser.add_argument("--without-freeze", action="store_true", help="only snapshot: it must then fail")
    parser.add_argument("--hasty-commits", action="store_true", help="no commit waits for the disk: it must then fail")
    return parser.parse_args()


def main() -> int:
    """Run the campaign, or go on with it."""
    options = _parse()
    labels = {"commit": commit(), "seed": options.seed}
    earlier = read_results(options.results) if options.results else []
    results = [one for one in earlier if one["commit"] == labels["commit"]]
    done = {one["cycle"] for one in results if one["seed"] == options.seed}
    todo = [number for number in range(options.count) if number not in done]
    boots = [todo[index : index + SNAPSHOTS_PER_BOOT] for index in range(0, len(todo), SNAPSHOTS_PER_BOOT)]
    if boots:
        with boot("trixie") as guest, loaded(guest) as load:
            for result in (one for numbers in boots for one in run_boot(load, numbers, options)):
                results.append(labels | result)
                line = json.dumps(results[-1]) + "\n"
                sys.stdout.write(line)
                sys.stdout.flush()
                if options.results:
                    with options.results.open("a") as file:
                        file.write(line)
    sys.stdout.write(summary(results) + "\n")
    return 1 if any(result["complaints"] for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
