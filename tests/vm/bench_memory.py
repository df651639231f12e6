"""Memory taken and given, with us and with others: python -m tests.vm.bench_memory [BENCHMARK ...] [--pairs N] ...

Each benchmark boots a guest, in which our agent, virtio-balloon, virtio-mem, a udev rule and the kernel itself take
turns, every other round the other way round; the first round is a rehearsal. Each turn becomes lines in the file of
results. What that file has already is not done again: a run that was broken off goes on where it was. The table goes to
stdout, and with --document into that file. The exit status is 1 if a ratio is above what we promise.

hot: 1 GiB of hot-added memory, taken away and given back. boot: 512 MiB of boot memory. hotadd-8, hotadd-64: a DIMM of
so many blocks, until they are online. burst: from a program's first wait for memory to the first new block. job: what a
program in the guest notices of memory that is taken and given.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tests.vm.bench import insert, read_commit
from tests.vm.bench_burst import measure_burst
from tests.vm.bench_figures import read_results
from tests.vm.bench_hotadd import measure_hotadd
from tests.vm.bench_job import measure_job
from tests.vm.bench_machine import GIB, Machine, boot
from tests.vm.bench_memory_figures import (
    ALONE,
    BALLAST,
    KERNEL,
    UDEV,
    VIRTIO_BALLOON,
    VIRTIO_MEM,
    Line,
    broken_bounds,
    compare,
    table,
)
from tests.vm.bench_reclaim import measure_boot, measure_hot
from tests.vm.conftest import DIST

MARK = "memory figures"


@dataclass(frozen=True, slots=True)
class Benchmark:
    """Who takes part, what each does, and the boot memory of their guest."""

    measure: Callable[[Machine, str], list[Line]]
    contenders: Sequence[str]
    memory_bytes: int = 2 * GIB


BENCHMARKS = {
    "hot": Benchmark(measure_hot, (BALLAST, VIRTIO_BALLOON, VIRTIO_MEM)),
    "boot": Benchmark(measure_boot, (BALLAST, VIRTIO_BALLOON)),
    # By the zone rule 64 blocks are movable beside so much.
    "hotadd-8": Benchmark(partial(measure_hotadd, blocks=8), (BALLAST, UDEV, KERNEL), 3 * GIB),
    "hotadd-64": Benchmark(partial(measure_hotadd, blocks=64), (BALLAST, UDEV, KERNEL), 3 * GIB),
    "burst": Benchmark(measure_burst, (BALLAST, KERNEL)),
    "job": Benchmark(measure_job, (BALLAST, VIRTIO_BALLOON, ALONE)),
}


def run_pair(machine: Machine, name: str, number: int, without: str = "") -> list[Line]:
    """One turn of everybody, but perhaps for one; their lines."""
    benchmark, run = BENCHMARKS[name], str(uuid.uuid4())
    about = {"benchmark": name, "run": run, "pair": number}
    contenders = benchmark.contenders[:: 1 if number % 2 else -1]
    return [
        {**line, "contender": contender, **about}
        for contender in contenders
        if contender != without
        for line in benchmark.measure(machine, contender)
    ]


def read_lines(path: Path, commit: str) -> list[Line]:
    """What was done before, of the same commit; SystemExit."""
    lines = read_results(path.read_text()) if path.exists() else []
    if lines and lines[0]["commit"] != commit:
        sys.exit(
            f"{path} has results of commit {lines[0]['commit']}, and this is {commit}: name another with --results"
        )
    return lines


def run(options: argparse.Namespace) -> None:
    """Add the lines that are not there yet."""
    commit = read_commit()
    before = read_lines(options.results, commit)
    for name in options.benchmarks or BENCHMARKS:
        there = len({line["run"] for line in before if line["benchmark"] == name})
        if there >= options.pairs:
            continue
        with boot(BENCHMARKS[name].memory_bytes, options.packages) as machine, options.results.open("a") as file:
            kernel = machine.guest.run(["uname", "-r"]).stdout.strip()
            facts = {"commit": commit, "kernel": kernel, "date": time.strftime("%Y-%m-%d")}
            run_pair(machine, name, 0)  # the rehearsal
            for number in range(there + 1, options.pairs + 1):
                from_s = time.monotonic()
                lines = run_pair(machine, name, number)
                file.writelines(json.dumps(line | facts) + "\n" for line in lines)
                file.flush()
                _say(f"{name} {number} of {options.pairs}, {time.monotonic() - from_s:.0f} s: {_short(lines)}")


def _short(lines: Sequence[Line]) -> str:
    return ", ".join(f"{line['measure']} {line['contender']} {line['ms']:.0f} ms" for line in lines)


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def _head(results: Sequence[dict[str, Any]]) -> str:
    """Where the figures come from."""
    last = results[-1]
    return f"\n`make bench`, commit {last['commit']}, Linux {last['kernel']}, {last['date']}\n\n"


def main() -> int:
    """Run the benchmarks."""
    parser = argparse.ArgumentParser(prog="python -m tests.vm.bench_memory", description=__doc__)
    parser.add_argument("benchmarks", nargs="*", choices=list(BENCHMARKS), help="all")
    parser.add_argument("--pairs", type=int, default=15, help="turns of each contender (15)")
    parser.add_argument("--results", type=Path, default=Path("bench-memory.jsonl"), help="added to, bench-memory.jsonl")
    parser.add_argument("--packages", type=Path, default=DIST, help="where ours are (dist)")
    parser.add_argument("--document", type=Path, help="a Markdown file that the table goes into")
    options = parser.parse_args()
    run(options)
    results = read_results(options.results.read_text())
    comparisons = compare(results)
    figures = _head(results) + table(comparisons) + "\n"
    _say(figures)
    if options.document:
        options.document.write_text(insert(options.document.read_text(), figures, MARK))
    broken = broken_bounds(comparisons)
    for line in broken:
        _say(line)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
