"""The fault campaign's plan, and what it makes of the two writers' log."""

from __future__ import annotations

from collections import Counter
from itertools import islice

import pytest

from tests.vm.fault_kinds import KINDS
from tests.vm.fault_writers import complaint
from tests.vm.faults import rounds, summary
from tests.vm.witness import Harm

ASKED = ["lab-shop prepare", "lab-base prepare", "lab-shop freeze", "lab-base freeze"]


def test_a_thousand_rounds_have_twenty_of_each_kind_and_a_seed_means_one_order() -> None:
    plan = list(islice(rounds(1), 1000))
    counts = Counter(kind for _, kind in plan)
    assert set(counts) == set(KINDS)
    assert min(counts.values()) >= 20
    assert plan == list(islice(rounds(1), 1000))
    assert plan != list(islice(rounds(2), 1000))


def test_every_harm_can_be_done() -> None:
    variants = [variant for kind, variants in KINDS.items() if kind != "rebooted" for variant in variants]
    verbs = {harm.split()[0].replace("-", "_") for one in variants for harm in (*one.harms, *one.afterwards)}
    assert not [verb for verb in verbs if not hasattr(Harm, verb)]


def test_one_who_lets_go_once_and_in_order_is_well() -> None:
    assert complaint([*ASKED, "lab-base thaw", "lab-shop thaw", "lab-base post"]) is None
    assert complaint([*ASKED, "lab-base abort", "lab-shop thaw"]) is None


@pytest.mark.parametrize(
    "undone",
    [
        [],
        ["lab-base thaw"],
        ["lab-base thaw", "lab-base abort", "lab-shop thaw"],
        ["lab-shop thaw", "lab-base thaw"],
    ],
    ids=["none", "one", "twice", "order"],
)
def test_a_writer_that_is_not_undone_once_or_out_of_turn_is_seen(undone: list[str]) -> None:
    assert complaint([*ASKED, *undone])


def test_the_figure_is_the_sum_over_the_runs_of_one_commit() -> None:
    results = [
        {"commit": "a", "seed": 1, "kind": "host-gone", "worst_s": 1.5},
        {"commit": "a", "seed": 2, "kind": "host-gone", "worst_s": 2.25},
        {"commit": "b", "seed": 1, "kind": "rebooted", "failed": "no"},
    ]
    lines = summary(results).splitlines()
    assert lines[0] == "a: 2 rounds, 0 failed"
    assert "worst   2.25 s" in lines[1]
    assert lines[2] == "b: 1 rounds, 1 failed"
