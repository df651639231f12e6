"""What each process takes where nothing happens, as a table: python -m tests.vm.bench_idle [--document FILE] ...

Runs `python -m tests.vm.idle` (which says how it is measured) in a guest of each suite, ten minutes and some each. The
exit status is 1 if anything is more than what we promise.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.lab.image import SUITES
from tests.vm.bench import insert, read_commit

MARK = "idle figures"
MIB = 1 << 20
HEAD = """\
| guest | process | threads | time | CPU | wake-ups | of them for the watchdog | RSS | PSS |
|---|---|---|---|---|---|---|---|---|
"""


def measure(suite: str, seconds: float) -> dict[str, Any]:
    """What `python -m tests.vm.idle` says."""
    argv = [sys.executable, "-m", "tests.vm.idle", "--suite", suite, "--seconds", str(seconds)]
    said = subprocess.run(argv, stdout=subprocess.PIPE, text=True, check=False).stdout
    return dict(json.loads(said))


def table(figures: Sequence[dict[str, Any]]) -> str:
    """As Markdown. In the first of a guest's processes is the agent; guard and holder run only when they are needed."""
    rows = [
        f"| {guest['suite']} | {one['name']} | {one['threads']} | {_counts(guest, one)} | "
        f"{one['rss-bytes'] / MIB:.1f} MiB | {one['pss-bytes'] / MIB:.1f} MiB |\n"
        for guest in figures
        for one in guest["processes"]
    ]
    return HEAD + "".join(rows)


def _counts(guest: dict[str, Any], one: dict[str, Any]) -> str:
    """Only who was looked at while nothing happened has any: the first, the agent, and qemu-ga."""
    place = guest["processes"].index(one)
    if place > 1:
        return " |  |  | "
    fed = guest["watchdog-wake-ups"] if place == 0 else ""
    return f"{guest['seconds']:.0f} s | {one['cpu-ms']:.0f} ms | {one['wake-ups']} | {fed}"


def main() -> int:
    """Measure, and write."""
    parser = argparse.ArgumentParser(prog="python -m tests.vm.bench_idle", description=__doc__)
    parser.add_argument("--suite", choices=SUITES, action="append", help="only this Debian; may be repeated")
    parser.add_argument("--seconds", type=float, default=600.0, help="how long nothing happens (600)")
    parser.add_argument("--document", type=Path, help="a Markdown file that the table goes into")
    options = parser.parse_args()
    figures = [measure(suite, options.seconds) for suite in options.suite or SUITES]
    about = f"\n`make bench`, commit {read_commit()}, {time.strftime('%Y-%m-%d')}\n\n"
    told = about + table(figures) + "\n"
    sys.stdout.write(told)
    if options.document:
        options.document.write_text(insert(options.document.read_text(), told, MARK))
    broken = [f"{guest['suite']}: {one}" for guest in figures for one in guest["broken"]]
    sys.stdout.writelines(f"{line}\n" for line in broken)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
