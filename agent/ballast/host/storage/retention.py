"""Which backups stay, which go, and what must be merged first. Pure: no clock, no file.

The rules are those of borg and restic: ``daily=7`` keeps the newest backup of each of the last seven days, in UTC, on
which there is one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from datetime import UTC, datetime


@dataclass(frozen=True, slots=True)
class Moment:
    """What a rule looks at. ``held`` is false for a backup whose freeze was over before its cut, None without any."""

    id: str
    made: datetime
    base: str | None
    held: bool | None


@dataclass(frozen=True, slots=True)
class Keep:
    """How many of each to keep. With none at all everything is kept."""

    last: int = 0
    hourly: int = 0
    daily: int = 0
    weekly: int = 0
    monthly: int = 0


@dataclass(frozen=True, slots=True)
class Merge:
    """Backup ``id`` takes in all that lies between it and ``onto``, its base from then on; None: it becomes full."""

    id: str
    onto: str | None


@dataclass(frozen=True, slots=True)
class Plan:
    """First ``merges``, one after another, then ``go``, in that order: each is possible when its turn comes.

    ``stay`` has each backup's reasons, for people: ``daily 2026-11-23``.
    """

    stay: dict[str, list[str]]
    merges: list[Merge]
    go: list[str]


_BUCKETS: dict[str, Callable[[datetime], str]] = {
    "hourly": lambda made: f"{made:%Y-%m-%d %H}h",
    "daily": lambda made: f"{made:%Y-%m-%d}",
    # Weeks belong to the year that most of their days are in (ISO 8601).
    "weekly": lambda made: f"{made:%G-W%V}",
    "monthly": lambda made: f"{made:%Y-%m}",
}


def plan(moments: Sequence[Moment], keep: Keep) -> Plan:
    """Decide on all restorable backups of a machine, in the order in which they were made, each behind its base.

    The newest stays whatever the rules say, since the next increment is based on it, and so does the newest that held.
    """
    if not any(getattr(keep, field.name) for field in fields(keep)):
        return Plan({moment.id: ["no rule"] for moment in moments}, [], [])
    reasons: dict[str, list[str]] = {moment.id: [] for moment in moments}
    for moment in moments[-1:]:
        reasons[moment.id].append("newest")
    for moment in [moment for moment in moments if moment.held][-1:]:
        reasons[moment.id].append("newest that held")
    for moment in moments[max(0, len(moments) - keep.last) :]:
        reasons[moment.id].append("last")
    for rule, name_of in _BUCKETS.items():
        for name, moment in _chosen(moments, name_of, getattr(keep, rule)):
            reasons[moment.id].append(f"{rule} {name}")
    stay = {id_: why for id_, why in reasons.items() if why}
    # Newest first: what is based on another goes before it.
    go = [moment.id for moment in reversed(moments) if moment.id not in stay]
    return Plan(stay, _merges(moments, stay), go)


def _chosen(moments: Sequence[Moment], name_of: Callable[[datetime], str], count: int) -> list[tuple[str, Moment]]:
    """One of each of the newest ``count`` buckets: its newest, but one that did not hold only if there is no other."""
    buckets: dict[str, list[Moment]] = {}
    for moment in moments:
        buckets.setdefault(name_of(moment.made.astimezone(UTC)), []).append(moment)
    return [(name, _best(buckets[name])) for name in sorted(buckets, reverse=True)[:count]]


def _best(bucket: Sequence[Moment]) -> Moment:
    return ([moment for moment in bucket if moment.held is not False] or bucket)[-1]


def _merges(moments: Sequence[Moment], stay: dict[str, list[str]]) -> list[Merge]:
    bases = {moment.id: moment.base for moment in moments}
    merges = []
    for id_ in stay:
        onto = bases[id_]
        while onto is not None and onto not in stay:
            onto = bases[onto]
        if onto != bases[id_]:
            merges.append(Merge(id_, onto))
    return merges
