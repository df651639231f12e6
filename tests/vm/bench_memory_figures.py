"""What the lines of the memory benchmarks say: ours against each peer, what was promised, and a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from tests.vm.bench_figures import Ratio

BALLAST, VIRTIO_BALLOON, VIRTIO_MEM = "ballast", "virtio-balloon", "virtio-mem"
UDEV, KERNEL, ALONE = "udev rule", "kernel", "left alone"
TITLES = {
    "reclaim-hot": "reclaim, 1 GiB of hot-added memory",
    "return-hot": "return of 1 GiB of hot-added memory",
    "reclaim-boot": "reclaim, 512 MiB of boot memory",
    "reclaim-boot-first": "reclaim, 512 MiB of boot memory, with the start of our balloon's process",
    "return-boot": "return of 512 MiB of boot memory",
    "hotadd-8": "hot-add, first block seen to all online, 8 blocks",
    "hotadd-64": "hot-add, first block seen to all online, 64 blocks",
    "burst": "first stall of a burst to its first new block",
    "job": "a job of its own, memory taken and given meanwhile",
}
# What ours may be, in medians of the peer's.
BOUNDS = {
    ("reclaim-hot", VIRTIO_BALLOON): 0.1,
    ("reclaim-hot", VIRTIO_MEM): 1.1,
    ("reclaim-boot", VIRTIO_BALLOON): 1.1,
    ("hotadd-8", UDEV): 0.5,
    ("hotadd-64", UDEV): 0.6,
    ("hotadd-64", KERNEL): 1.1,
}
HEAD = """\
| what | peer | pairs | Ballast | peer | ratio | bound | MiB/s: Ballast | peer | host's use: Ballast | peer |
|---|---|---|---|---|---|---|---|---|---|---|
"""

Line = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Comparison:
    """One measure, ours and a peer's; ``pairs`` are the lines of both."""

    measure: str
    peer: str
    pairs: Sequence[tuple[Line, Line]]

    @property
    def time(self) -> Ratio:
        """How long it took."""
        return Ratio.of([(ours["ms"], theirs["ms"]) for ours, theirs in self.pairs])

    @property
    def bound(self) -> float | None:
        """What we promise."""
        return BOUNDS.get((self.measure, self.peer))

    def __str__(self) -> str:
        bound = "" if self.bound is None else f"{self.bound:g}"
        sides = [[pair[side] for pair in self.pairs] for side in (0, 1)]
        rates, uses = " | ".join(map(_rate, sides)), " | ".join(map(_use, sides))
        title = TITLES[self.measure]
        return f"| {title} | {self.peer} | {len(self.pairs)} | {self.time} | {bound} | {rates} | {uses} |"


def compare(lines: Sequence[Line]) -> list[Comparison]:
    """Each measure with each of its peers, in the order of TITLES; lines without their other half are left out."""
    found: dict[tuple[str, str, int], dict[str, Line]] = {}
    for line in lines:
        found.setdefault((line["measure"], line["run"], line["pair"]), {})[line["contender"]] = line
    pairs: dict[tuple[str, str], list[tuple[Line, Line]]] = {}
    for (measure, _, _), contenders in found.items():
        for peer, theirs in contenders.items():
            if peer != BALLAST and BALLAST in contenders:
                pairs.setdefault((measure, peer), []).append((contenders[BALLAST], theirs))
    order = list(TITLES)
    return [Comparison(*key, pairs[key]) for key in sorted(pairs, key=lambda key: (order.index(key[0]), key[1]))]


def table(comparisons: Sequence[Comparison]) -> str:
    """As Markdown."""
    return HEAD + "".join(f"{comparison}\n" for comparison in comparisons)


def broken_bounds(comparisons: Sequence[Comparison]) -> list[str]:
    """What is above its bound, in words."""
    return [
        f"{TITLES[one.measure]}: {one.time.ratio:.2f} times {one.peer}'s, not {one.bound:g}"
        for one in comparisons
        if one.bound is not None and one.time.ratio > one.bound
    ]


def _rate(lines: Sequence[Line]) -> str:
    if any(line.get("mib") is None for line in lines):
        return ""
    return f"{median(1000 * line['mib'] / line['ms'] for line in lines):.0f}"


def _use(lines: Sequence[Line]) -> str:
    """Of what the guest's memory takes on the host: before and after, or the area under its curve."""
    if all("host_gib_min" in line for line in lines):
        return f"{median(line['host_gib_min'] for line in lines):.3f} GiB min"
    if any(line.get("host_mib") is None for line in lines):
        return ""
    before, after = (median(line["host_mib"][when] for line in lines) for when in (0, 1))
    return f"{before:.0f} to {after:.0f} MiB"
