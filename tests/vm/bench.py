"""How long writers stand still for a freeze, with us and with qemu-ga: python -m tests.vm.bench [--pairs N] ...

In one guest, with 1, 4 and 8 file systems, idle and under buffered and direct writes, both agents freeze and thaw in
turns (stopwatch.py says how it is measured). Each freeze becomes a line in the file of results, to which a later run of
the same commit adds its own; the table goes to stdout, and with --document into that file. The exit status is 1 if a
ratio is above what we promise.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.lab.guest import Guest
from tests.lab.image import build
from tests.vm.bench_figures import Comparison, compare, read_results, table
from tests.vm.conftest import TOKEN, packages

STOPWATCH = Path(__file__).parent / "stopwatch.py"
IN_GUEST = "/run/lab-stopwatch.py"
KINDS = ("ext4", "xfs", "btrfs", "ext4", "xfs", "btrfs", "xfs")
DISK_BYTES = 512 << 20
MOUNTPOINTS = ["/mnt/data0", "/", *(f"/mnt/data{number}" for number in range(1, len(KINDS)))]
COUNTS = (1, 4, 8)
LOADS = ("idle", "buffered", "direct")
CASES = {f"{count}-{load}": (count, load) for load in LOADS for count in COUNTS}
# What a case's longest write gap may be, in medians of qemu-ga's.
PROMISES = {(4, "buffered"): 0.2, (1, "idle"): 1.1}
SETTLE_S = 3.0
PAIR_TIMEOUT_S = 60.0  # far more than it takes
MARK = "figures"


def time_case(guest: Guest, count: int, load: str, pairs: int) -> Iterator[dict[str, Any]]:
    """Run so many pairs with so many of the guest's file systems; each freeze, as it was."""
    points = MOUNTPOINTS[:count]
    guest.put(IN_GUEST, STOPWATCH.read_bytes())
    argv = ["/usr/bin/python3", "-IB", IN_GUEST, load, str(pairs), str(SETTLE_S), *points]
    ended = guest.run(argv, timeout_s=(pairs + 1) * PAIR_TIMEOUT_S)
    run = str(uuid.uuid4())
    for line in ended.stdout.splitlines():
        yield {**json.loads(line), "run": run}


def broken_promises(comparisons: list[Comparison]) -> list[str]:
    """What is above its bound, in words."""
    return [
        f"{case.filesystems} file systems, {case.load}: a gap of {case.gap.ratio:.2f} times qemu-ga's, not {bound}"
        for case in comparisons
        if (bound := PROMISES.get((case.filesystems, case.load))) is not None and case.gap.ratio > bound
    ]


def insert(document: str, figures: str, mark: str = MARK) -> str:
    """Put figures in the place of the older ones, between the two comments that have this mark."""
    begin, end = f"<!-- {mark} -->\n", f"<!-- end of {mark} -->"
    head, _, rest = document.partition(begin)
    return f"{head}{begin}{figures}{end}{rest.partition(end)[2]}"


def _head(results: list[dict[str, Any]], command: str) -> str:
    """Where the figures come from."""
    last = results[-1]
    return f"\n`{command}`, commit {last['commit']}, Linux {last['kernel']}, {last['date']}\n\n"


def read_commit() -> str:
    """Of this tree, and whether it is changed."""
    argv = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    return subprocess.run(argv, check=True, capture_output=True, text=True).stdout.strip()


def _run(options: argparse.Namespace) -> None:
    """Add the lines of all cases that are wanted to the file of results."""
    disks = [(kind, DISK_BYTES) for kind in KINDS]
    with Guest(build("trixie"), disks=disks, token=TOKEN) as guest, options.results.open("a") as file:
        guest.wait_boot()
        guest.install(packages())
        guest.run("rm -rf /etc/qemu/fsfreeze-hook*")  # which came with qemu-ga, and would be run by us only
        kernel = guest.run(["uname", "-r"]).stdout.strip()
        facts = {"commit": read_commit(), "kernel": kernel, "date": time.strftime("%Y-%m-%d")}
        for name in options.only or CASES:
            count, load = CASES[name]
            results = [result | facts for result in time_case(guest, count, load, options.pairs)]
            file.writelines(json.dumps(result) + "\n" for result in results)
            file.flush()
            sys.stdout.writelines(f"{comparison}\n" for comparison in compare(results))
            sys.stdout.flush()


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(prog="python -m tests.vm.bench", description=__doc__)
    parser.add_argument("--pairs", type=int, default=15, help="freezes of each agent in each case (15)")
    parser.add_argument("--only", choices=list(CASES), action="append", help="only this case; may be repeated")
    parser.add_argument("--results", type=Path, default=Path("bench.jsonl"), help="added to (bench.jsonl)")
    parser.add_argument("--document", type=Path, help="a Markdown file that the table goes into")
    options = parser.parse_args()
    if options.pairs > 0:
        _run(options)
    results = read_results(options.results.read_text())
    comparisons = compare(results)
    figures = _head(results, "make bench") + table(comparisons) + "\n"
    sys.stdout.write(figures)
    if options.document:
        options.document.write_text(insert(options.document.read_text(), figures))
    broken = broken_promises(comparisons)
    sys.stdout.writelines(f"{line}\n" for line in broken)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
