"""What a benchmark's lines say."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.vm.bench import broken_promises, insert
from tests.vm.bench_figures import Ratio, compare, read_results, table


def freeze(agent: str, pair: int, gap_ms: float, **more: Any) -> dict[str, Any]:
    """A line of the stopwatch."""
    line = {"run": "r", "filesystems": 4, "load": "buffered", "pair": pair, "agent": agent, "gap_ms": gap_ms}
    return line | {"freeze_ms": 2 * gap_ms, "commit": "c", "kernel": "k", "date": "2026-01-01"} | more


def pairs(ours_ms: float, theirs_ms: float, **more: Any) -> list[dict[str, Any]]:
    return [
        freeze(agent, number, gap_ms + number, **more)
        for number in range(5)
        for agent, gap_ms in (("ballast", ours_ms), ("qemu-ga", theirs_ms))
    ]


def test_a_ratio_is_that_of_the_medians_and_lies_within_its_interval() -> None:
    ratio = Ratio.of([(10, 100), (20, 100), (30, 200), (40, 300), (1000, 50)])
    assert (ratio.ours_ms, ratio.theirs_ms, ratio.ratio) == (30, 100, 0.3)
    assert ratio.low < 0.3 < ratio.high
    assert Ratio.of([(10, 100)] * 3) == Ratio(10, 100, 0.1, 0.1, 0.1)


def test_each_case_is_compared_by_itself_and_halves_of_pairs_are_left_out() -> None:
    lines = [*pairs(10, 100), freeze("ballast", 99, 5000), *pairs(10, 10, load="idle", filesystems=1)]
    buffered, idle = compare(lines)
    assert (buffered.filesystems, buffered.load, buffered.pairs) == (4, "buffered", 5)
    assert buffered.gap.ratio == 12 / 102
    assert buffered.call.theirs_ms == 204
    assert (idle.filesystems, idle.load, idle.gap.ratio) == (1, "idle", 1)


def test_pairs_of_several_runs_add_up() -> None:
    (case,) = compare([*pairs(10, 100), *pairs(10, 100, run="another")])
    assert case.pairs == 10


def test_results_of_several_commits_are_no_figure() -> None:
    lines = [freeze("ballast", 1, 1), freeze("qemu-ga", 1, 1, commit="d")]
    with pytest.raises(ValueError, match="several commits: c, d"):
        read_results("".join(json.dumps(line) + "\n" for line in lines))
    assert read_results(json.dumps(lines[0]) + "\n") == lines[:1]


def test_a_broken_promise_is_told() -> None:
    assert broken_promises(compare(pairs(10, 100))) == []
    (told,) = broken_promises(compare(pairs(50, 100)))
    assert told == "4 file systems, buffered: a gap of 0.51 times qemu-ga's, not 0.2"


def test_figures_take_the_place_of_older_ones() -> None:
    figures = table(compare(pairs(10, 100)))
    begin, end = "<!-- figures -->\n", "<!-- end of figures -->"
    others = "<!-- other figures -->\nold\n<!-- end of other figures -->"
    document = insert(f"# Title\n\n{begin}old\n{end}\n\n{others}\n", figures)
    assert document == f"# Title\n\n{begin}{figures}{end}\n\n{others}\n"
    assert insert(document, figures) == document
    assert insert(document, figures, "other figures").startswith(document.partition("old")[0])
    assert "| 4 | buffered | 5 | 12 ms | 102 ms | 0.12 (" in figures
