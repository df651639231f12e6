"""What stays, what goes, what is merged: by example, and what must hold of every plan."""

from __future__ import annotations

from dataclasses import fields, replace
from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ballast.host.storage.retention import Keep, Merge, Moment, plan


def moments(*texts: str) -> list[Moment]:
    """``2026-11-23T18:15``; `` on N`` for an increment, ``!`` for one that did not hold. Ids are numbers."""
    found = []
    for number, text in enumerate(texts):
        made, _, base = text.rstrip("!").partition(" on ")
        when = datetime.fromisoformat(made).replace(tzinfo=UTC)
        found.append(Moment(str(number), when, base or None, not text.endswith("!")))
    return found


@pytest.mark.parametrize(
    ("keep", "texts", "stay"),
    [
        (Keep(last=2), ["2026-11-20", "2026-11-21", "2026-11-22"], "12"),
        (Keep(last=9), ["2026-11-20", "2026-11-21"], "01"),
        (Keep(hourly=2), ["2026-11-23T10:00", "2026-11-23T10:59", "2026-11-23T11:00"], "12"),
        # Buckets count where there is a backup.
        (Keep(daily=2), ["2026-01-01", "2026-06-01T01:00", "2026-06-01T02:00", "2026-11-23"], "23"),
        # 2027-01-03 is a Sunday, and its week the last of 2026.
        (Keep(weekly=2), ["2026-12-20", "2026-12-28", "2027-01-03", "2027-01-04"], "23"),
        (Keep(monthly=2), ["2026-10-31", "2026-11-01", "2026-11-30", "2026-12-01"], "23"),
        (Keep(daily=1, monthly=2), ["2026-10-31", "2026-11-01", "2026-11-23"], "02"),
        # One that did not hold satisfies a rule only if there is no other.
        (Keep(daily=2), ["2026-11-22T01:00", "2026-11-22T02:00!", "2026-11-23"], "02"),
        (Keep(daily=2), ["2026-11-22T01:00!", "2026-11-22T02:00!", "2026-11-23"], "12"),
        # Newest, and newest that held.
        (Keep(monthly=1), ["2026-10-01", "2026-11-22!", "2026-11-23!"], "02"),
        # A clock that was put back.
        (Keep(daily=1), ["2026-11-24", "2026-11-22", "2026-11-23"], "02"),
    ],
)
def test_rules_keep(keep: Keep, texts: list[str], stay: str) -> None:
    made = plan(moments(*texts), keep)
    assert "".join(made.stay) == stay
    assert sorted([*made.stay, *made.go]) == [str(number) for number in range(len(texts))]


def test_each_that_stays_says_why() -> None:
    made = plan(moments("2026-11-22", "2026-11-23T18:15"), Keep(1, 1, 2, 1, 1))
    assert made.stay == {
        "0": ["daily 2026-11-22"],
        "1": [
            "newest",
            "newest that held",
            "last",
            "hourly 2026-11-23 18h",
            "daily 2026-11-23",
            "weekly 2026-W48",
            "monthly 2026-11",
        ],
    }


def test_days_are_those_of_utc() -> None:
    east = datetime(2026, 11, 23, 1, tzinfo=timezone(timedelta(hours=2)))
    assert plan([Moment("a", east, None, True)], Keep(daily=1)).stay["a"][-1] == "daily 2026-11-22"


def test_without_a_rule_and_without_a_backup_nothing_goes() -> None:
    assert plan(moments("2026-11-22", "2026-11-23"), Keep()).go == []
    assert plan([], Keep(last=1)).stay == {}


def test_what_goes_is_merged_into_what_is_based_on_it() -> None:
    chain = moments(
        "2026-11-20", "2026-11-21T01:00 on 0", "2026-11-21T02:00 on 1", "2026-11-22T01:00 on 2", "2026-11-22T02:00 on 3"
    )
    made = plan(chain, Keep(daily=2))
    assert made.merges == [Merge("2", None), Merge("4", "2")]
    assert made.go == ["3", "1", "0"]


def test_a_chain_of_which_nothing_stays_needs_no_merge() -> None:
    made = plan(moments("2026-11-20", "2026-11-21 on 0", "2026-11-22", "2026-11-23 on 2"), Keep(daily=2))
    assert (made.merges, made.go) == ([], ["1", "0"])


@st.composite
def histories(draw: st.DrawFn) -> list[Moment]:
    """Backups in order, each full or on any earlier one; now and then the clock is put back."""
    when = datetime(2026, 11, 23, 18, 15, tzinfo=UTC)
    found: list[Moment] = []
    for number in range(draw(st.integers(0, 30))):
        when += timedelta(minutes=draw(st.integers(-600, 20_000)))
        base = draw(st.sampled_from([None, *[moment.id for moment in found[-3:]]]))
        found.append(Moment(f"{number:02}", when, base, draw(st.sampled_from([True, False, None]))))
    return found


keeps = st.builds(Keep, *[st.integers(0, 6)] * 5)


def after(history: list[Moment], keep: Keep) -> list[Moment]:
    """Do what the plan says, step by step; each step must be possible."""
    made = plan(history, keep)
    there = {moment.id: moment for moment in history}
    for merge in made.merges:
        above = [there[merge.id].base]
        while (base := above[-1]) is not None:
            above.append(there[base].base)
        assert merge.onto in above[1:]
        there[merge.id] = replace(there[merge.id], base=merge.onto)
    for id_ in made.go:
        assert id_ not in {moment.base for moment in there.values()}
        del there[id_]
    assert list(there) == list(made.stay)
    return list(there.values())


@given(histories(), keeps)
def test_what_stays_can_be_restored(history: list[Moment], keep: Keep) -> None:
    left = after(history, keep)
    assert {moment.base for moment in left} <= {None, *[moment.id for moment in left]}


@given(histories(), keeps)
def test_the_newest_and_the_newest_that_held_stay(history: list[Moment], keep: Keep) -> None:
    left = {moment.id for moment in after(history, keep)}
    held = [moment.id for moment in history if moment.held]
    assert left >= {*[moment.id for moment in history[-1:]], *held[-1:]}


@given(histories(), keeps)
def test_a_second_time_nothing_is_left_to_do(history: list[Moment], keep: Keep) -> None:
    again = plan(after(history, keep), keep)
    assert (again.go, again.merges) == ([], [])


@given(histories(), keeps, keeps)
def test_who_keeps_more_loses_no_more(history: list[Moment], keep: Keep, more: Keep) -> None:
    if keep == Keep():  # everything is kept
        return
    both = Keep(*(getattr(keep, field.name) + getattr(more, field.name) for field in fields(keep)))
    assert set(plan(history, keep).stay) <= set(plan(history, both).stay)
