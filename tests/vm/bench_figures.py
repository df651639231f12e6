"""What the freezes of a benchmark say when both agents are compared: medians, ratios, a table."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

RESAMPLES = 2000
HEAD = """\
| file systems | load | pairs | longest write gap: Ballast | qemu-ga | ratio | call: Ballast | qemu-ga | ratio |
|---|---|---|---|---|---|---|---|---|
"""


@dataclass(frozen=True, slots=True)
class Ratio:
    """Median of ours over median of theirs, and where it lies in 95 of 100 samples drawn anew from the pairs."""

    ours_ms: float
    theirs_ms: float
    ratio: float
    low: float
    high: float

    @classmethod
    def of(cls, pairs: Sequence[tuple[float, float]]) -> Ratio:
        """Of the pairs (ours, theirs) in milliseconds; at least one."""
        chance = random.Random(0)  # drawn alike each time
        drawn = sorted(_ratio([chance.choice(pairs) for _ in pairs]) for _ in range(RESAMPLES))
        ours_ms, theirs_ms = _medians(pairs)
        edge = RESAMPLES // 40
        return cls(ours_ms, theirs_ms, ours_ms / theirs_ms, drawn[edge], drawn[-edge - 1])

    def __str__(self) -> str:
        return f"{self.ours_ms:.0f} ms | {self.theirs_ms:.0f} ms | {self.ratio:.2f} ({self.low:.2f} to {self.high:.2f})"


@dataclass(frozen=True, slots=True)
class Comparison:
    """One case: so many file systems under a load."""

    filesystems: int
    load: str
    pairs: int
    gap: Ratio
    call: Ratio

    def __str__(self) -> str:
        return f"| {self.filesystems} | {self.load} | {self.pairs} | {self.gap} | {self.call} |"


def read_results(text: str) -> list[dict[str, Any]]:
    """The lines of a file of results. ValueError if they are of several commits or kernels."""
    results = [json.loads(line) for line in text.splitlines()]
    for name in ("commit", "kernel"):
        if len(found := {result[name] for result in results}) > 1:
            raise ValueError(f"results of several {name}s: {', '.join(sorted(found))}")
    return results


def compare(results: Sequence[dict[str, Any]]) -> list[Comparison]:
    """One for each case, in the order in which they first came; freezes without their other half are left out."""
    pairs: dict[tuple[int, str], dict[tuple[str, int], dict[str, Any]]] = {}
    for result in results:
        case = pairs.setdefault((result["filesystems"], result["load"]), {})
        case.setdefault((result["run"], result["pair"]), {})[result["agent"]] = result
    return [
        Comparison(filesystems, load, len(whole), _of(whole, "gap_ms"), _of(whole, "freeze_ms"))
        for (filesystems, load), case in pairs.items()
        if (whole := [pair for pair in case.values() if len(pair) == len(("ballast", "qemu-ga"))])
    ]


def table(comparisons: Sequence[Comparison]) -> str:
    """As Markdown."""
    return HEAD + "".join(f"{comparison}\n" for comparison in comparisons)


def _of(pairs: Sequence[dict[str, Any]], name: str) -> Ratio:
    return Ratio.of([(pair["ballast"][name], pair["qemu-ga"][name]) for pair in pairs])


def _medians(pairs: Sequence[tuple[float, float]]) -> tuple[float, float]:
    return median(ours for ours, _ in pairs), median(theirs for _, theirs in pairs)


def _ratio(pairs: Sequence[tuple[float, float]]) -> float:
    ours_ms, theirs_ms = _medians(pairs)
    return ours_ms / theirs_ms
