"""What may go wrong while a guest is frozen, many times over: python -m tests.vm.faults [--count N] [--only KIND] ...

Each round freezes the root file system, with the journal and the agent's own files on it, and three data disks, with
two writers holding, does one harm, and lets the guest's own writes tell when everything thawed. Kinds come in an order
that the seed decides, each of them once or more in a block of 50 rounds. Results are lines of JSON; rounds of the
same commit and seed that the file of results has already are not run again, so a campaign that was interrupted goes on.
The exit status is 1 if any round missed its bound.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tests.lab.guest import BootFailed, Guest
from tests.lab.qemu import is_known_crash
from tests.vm.conftest import boot
from tests.vm.fault_kinds import DEAR, KINDS
from tests.vm.fault_round import RoundFailed, prepare, run_round

BLOCK = 50
SAID_CHARS = 20_000
Result = dict[str, Any]


def rounds(seed: int) -> Iterator[tuple[int, str]]:
    """Numbers and kinds, for ever; the same for the same seed."""
    cheap = [kind for kind in KINDS if kind not in DEAR]
    number = 0
    while True:
        dice = random.Random(f"{seed} {number}")
        block = [*KINDS, *dice.choices(cheap, k=BLOCK - len(KINDS))]
        dice.shuffle(block)
        for kind in block:
            yield number, kind
            number += 1


def commit() -> str:
    """What is tested; with a "+" if files of the packages are not as they were committed."""
    head = _git("rev-parse", "--short=12", "HEAD")
    return head + ("+" if _git("status", "--porcelain", "--", "agent", "units", "packaging") else "")


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], check=True, capture_output=True, text=True).stdout.strip()


def read_results(path: Path) -> list[Result]:
    """All lines; none if there is no such file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def summary(results: Iterable[Result]) -> str:
    """The figures, by commit: how many rounds of each kind, how many of them failed, the longest wait for a thaw."""
    commits: dict[str, dict[str, list[Result]]] = defaultdict(lambda: defaultdict(list))
    for result in results:
        commits[result["commit"]][result["kind"]].append(result)
    lines = []
    for name, kinds in commits.items():
        everything = [result for of_kind in kinds.values() for result in of_kind]
        lines.append(f"{name}: {len(everything)} rounds, {_failed(everything)} failed")
        for kind, of_kind in sorted(kinds.items()):
            worst_s = max((result["worst_s"] for result in of_kind if "worst_s" in result), default=0.0)
            lines.append(f"  {kind:22} {len(of_kind):5}  {_failed(of_kind):3} failed  worst {worst_s:6.2f} s")
    return "\n".join(lines)


def _shorten(text: str) -> str:
    """What went wrong is at its beginning, and what the journal said last at its end."""
    half = SAID_CHARS // 2
    return text if len(text) <= SAID_CHARS else f"{text[:half]}\n...\n{text[-half:]}"


def _failed(results: Iterable[Result]) -> int:
    return sum("failed" in result for result in results)


def run_until_lost(guest: Guest, todo: list[tuple[int, str]], labels: Result, until_s: float) -> Iterator[Result]:
    """Take rounds off ``todo``, and yield what came of each; ends early when the guest is no longer usable."""
    prepare(guest)
    while todo and time.monotonic() < until_s:
        number, kind = todo.pop(0)
        result = labels | {"round": number, "kind": kind}
        try:
            yield result | run_round(guest, kind, random.Random(f"{labels['seed']} {number} {kind}"))
        except RoundFailed as error:
            yield result | {"failed": _shorten(str(error))}
        except (ConnectionError, TimeoutError, BootFailed) as error:
            if not is_known_crash(guest.dir):
                yield result | {"failed": f"the guest is lost: {error!r}\n{guest.console_tail()}"}
            return


def main() -> int:
    """Run the campaign, or go on with it."""
    parser = argparse.ArgumentParser(prog="python -m tests.vm.faults", description=__doc__)
    parser.add_argument("--count", type=int, default=1000, help="rounds in all, with those of --results (1000)")
    parser.add_argument("--seed", type=int, default=1, help="decides about kinds and variants (1)")
    parser.add_argument("--only", choices=list(KINDS), action="append", help="only this kind; may be repeated")
    parser.add_argument("--minutes", type=float, default=1e6, help="begin no round after that time")
    parser.add_argument("--results", type=Path, help="the file to which results are appended")
    parser.add_argument("--summary", type=Path, metavar="FILE", help="only print the figures of such a file")
    options = parser.parse_args()
    if options.summary:
        sys.stdout.write(summary(read_results(options.summary)) + "\n")
        return 0
    labels = {"commit": commit(), "seed": options.seed}
    kinds = options.only or list(KINDS)
    earlier = [
        one for one in (read_results(options.results) if options.results else ()) if labels.items() <= one.items()
    ]
    results = [one for one in earlier if one["kind"] in kinds]
    done = {one["round"] for one in results}
    wanted = ((number, kind) for number, kind in rounds(options.seed) if kind in kinds and number not in done)
    todo = [next(wanted) for _ in range(options.count - len(done))]
    until_s = time.monotonic() + 60 * options.minutes
    while todo and time.monotonic() < until_s:
        with boot("trixie") as guest:
            for result in run_until_lost(guest, todo, labels, until_s):
                results.append(result)
                line = json.dumps(result) + "\n"
                sys.stdout.write(line)
                sys.stdout.flush()
                if options.results:
                    with options.results.open("a") as file:
                        file.write(line)
    sys.stdout.write(summary(results) + "\n")
    return 1 if _failed(results) else 0


if __name__ == "__main__":
    sys.exit(main())
