"""Risks that others tell of: each with its culprit, and what they do not tell as a risk too."""

from __future__ import annotations

import os
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime

import pytest

from ballast.guest.bus import BusError
from ballast.guest.quiesce.culprits import ask_others
from ballast.guest.quiesce.forecast import plan_freeze
from ballast.guest.quiesce.graph import Graph
from ballast.guest.quiesce.risks import Freeze, find_risks
from ballast.guest.quiesce.witnesses import Witnesses, parse_multipath, parse_timers
from ballast.wire.names import Risk
from tests.unit.guest.conftest import MakeTree
from tests.unit.guest.quiesce.conftest import FakeSystemd
from tests.unit.guest.quiesce.trees import ROOT, table

LEASE_S = 60.0
DATA = "253:0 xfs /dev/mapper/mpatha /data"
MULTIPATH = {"sys/dev/block/253:0/dm/uuid": "mpath-3600a0b8\n", "sys/dev/block/253:0/dm/name": "mpatha\n"}
PATHS = "0 1 1 service-time 0 1 2 8:16 1 1"


Find = Callable[..., Awaitable[list[Risk]]]


@pytest.fixture
def find(make_tree: MakeTree, systemd: FakeSystemd) -> Find:
    """What is found beside a root and a data disk; kind and detail."""

    witnesses = Witnesses(systemd.start)

    async def find(
        files: dict[str, str] = MULTIPATH,
        *,
        mounts: tuple[str, ...] = (ROOT, DATA),
        timeout_s: float = 10,
        max_age_s: float = 0,
    ) -> list[Risk]:
        tree = make_tree(table(*mounts) | files)
        freeze = Freeze(tree, Graph(tree), plan_freeze(tree), LEASE_S, max_age_s)
        return await find_risks(freeze, ask_others(witnesses), timeout_s=timeout_s)

    return find


def show(name: str, due: str, persistent: str = "yes") -> str:
    return f"Id={name}\nPersistent={persistent}\nNextElapseUSecRealtime={due}\n"


def utc(in_s: float) -> str:
    return datetime.fromtimestamp(time.time() + in_s, UTC).strftime("%a %Y-%m-%d %H:%M:%S UTC")


@pytest.mark.parametrize("text", [show("a.timer", "tomorrow"), show("a.timer", "Tue 2026-11-24 00:00:00 CET")])
def test_times_that_cannot_be_read_are_an_error(text: str) -> None:
    with pytest.raises(ValueError, match="does not match format"):
        parse_timers(text)


def test_persistent_timers_that_will_be_due_are_found() -> None:
    shown = [
        show("logrotate.timer", "Tue 2026-11-24 00:00:00 UTC"),
        show("boot.timer", "", "yes"),
        show("never.timer", "n/a"),
        show("clean.timer", "Tue 2026-11-24 00:00:01 UTC", "no"),
        "of-later\n",
    ]
    assert parse_timers("\n".join(shown)) == {"logrotate.timer": 1795478400.0}
    assert parse_timers("") == {}


@pytest.mark.parametrize("text", ["mpatha: 0 1 multipath many queue_if_no_path\n", "mpatha: 0\n"])
def test_tables_that_cannot_be_read_are_an_error(text: str) -> None:
    with pytest.raises(ValueError, match=r"invalid literal|not enough values"):
        parse_multipath(text)


def test_only_the_features_tell_whether_a_map_queues() -> None:
    text = (
        f"mpath a: b: 0 8 multipath 1 queue_if_no_path {PATHS}\n"
        f"two: 0 8 multipath 2 retain_attached_hw_handler queue_if_no_path {PATHS}\n"
        f"fails: 0 8 multipath 0 {PATHS}\n"
        f"odd: 0 8 multipath 1 retain_attached_hw_handler queue_if_no_path {PATHS}\n"
        "No devices found\n"
    )
    assert parse_multipath(text) == {"mpath a: b": True, "two": True, "fails": False, "odd": False}


async def test_where_nobody_stands_in_the_way_nothing_is_told(find: Find, systemd: FakeSystemd) -> None:
    assert await find({}) == []
    assert len(systemd.units) == 1, "without multipath nobody asks device-mapper"


async def test_a_scanner_is_named_with_what_it_watches(find: Find, systemd: FakeSystemd) -> None:
    marks = ["mnt_id:14 mflags:0 mask:10000", "sdev:fd00000 mflags:0 mask:10000", "mnt_id:3e7 mflags:0 mask:10000"]
    systemd.marks = "all\n" + "".join(f"/proc/812/fdinfo/5:fanotify {mark}\n" for mark in [*marks, "sdev:9 mask:3b"])
    systemd.marks += "/proc/99/fdinfo/3:fanotify sdev:800001 mask:40000\n"
    assert await find({"proc/812/comm": "clamonacc\n"}) == [
        Risk(
            "fanotify",
            "clamonacc (812) has to permit whatever is opened on /, /data, a mount of its own; if it waits for a "
            "frozen disk, so does everybody",
        ),
        Risk(
            "fanotify",
            "a process (99) has to permit whatever is opened on /; if it waits for a frozen disk, so does everybody",
        ),
    ]


async def test_many_mounts_are_counted(find: Find, systemd: FakeSystemd) -> None:
    mounts = [f"8:{n} ext4 /dev/sd /mnt/{n}" for n in range(16, 21)]
    systemd.marks = "all\n" + "".join(f"/proc/8/fdinfo/5:fanotify sdev:8000{n:02x} mask:10000\n" for n in range(16, 21))
    (risk,) = await find({}, mounts=(ROOT, *mounts))
    assert "opened on /mnt/16, /mnt/17, /mnt/18 and 2 more;" in risk.detail


@pytest.mark.parametrize(
    ("due_s", "told"),
    [(30, "logrotate.timer is due in "), (-30, "logrotate.timer is due now: "), (300, None)],
)
async def test_a_timer_within_the_lease_is_named(
    find: Find, systemd: FakeSystemd, due_s: float, told: str | None
) -> None:
    systemd.timers(f"cat <<'END'\n{show('logrotate.timer', utc(due_s))}END")
    found = await find({})
    assert [risk.kind for risk in found] == (["timer"] if told else [])
    if told:
        assert found[0].detail.startswith(told)
        assert found[0].detail.endswith("systemd writes its stamp to /, and starts nothing more until the thaw")


async def test_a_stamp_on_what_is_not_frozen_asks_nobody(find: Find, systemd: FakeSystemd) -> None:
    systemd.timers("exit 1")
    assert await find({}, mounts=(DATA, "0:50 tmpfs none /var")) == []


async def test_a_map_that_queues_is_named_with_what_is_on_it(find: Find, systemd: FakeSystemd) -> None:
    systemd.maps = f"mpatha: 0 8 multipath 1 queue_if_no_path {PATHS}\nmpathb: 0 8 multipath 0 {PATHS}\n"
    told = "mpatha queues for ever when its last path fails (queue_if_no_path), and with it /data"
    assert await find() == [Risk("multipath", told)]
    systemd.maps = f"mpatha: 0 8 multipath 0 {PATHS}\n"
    assert await find() == []
    assert [properties["CapabilityBoundingSet"].value for properties in systemd.units] == [1 << 19, 1 << 21] * 2


async def test_what_is_below_lvm_is_seen(find: Find, systemd: FakeSystemd) -> None:
    below = "sys/dev/block/253:0/slaves/dm-1/slaves/dm-0/dm"
    systemd.maps = f"mpatha: 0 8 multipath 1 queue_if_no_path {PATHS}\n"
    files = {f"{below}/uuid": "mpath-3600\n", f"{below}/name": "mpatha\n", "sys/dev/block/253:0/dm/uuid": "LVM-x\n"}
    assert [risk.kind for risk in await find(files)] == ["multipath"]


async def test_what_nobody_tells_is_told_as_a_risk(find: Find, systemd: FakeSystemd) -> None:
    systemd.marks = "/proc/812/fdinfo/5:fanotify sdev:800001 mask:10000\n"
    systemd.timers("exit 4")
    assert await find() == [
        Risk("fanotify", "cannot tell: nobody lets us look at processes"),
        Risk("timer", "cannot tell: systemctl exits with 4"),
        Risk("multipath", "cannot tell: device-mapper does not tell of mpatha"),
    ]
    systemd.error = BusError("no, not now")
    systemd.timers("echo x; echo Persistent=yes; echo NextElapseUSecRealtime=soon")
    assert [risk.detail[:22] for risk in await find()] == [
        "cannot tell: no, not n",
        "cannot tell: time data",
        "cannot tell: no, not n",
    ]


async def test_who_does_not_answer_is_not_waited_for(find: Find, systemd: FakeSystemd) -> None:
    systemd.marks = "silence"
    systemd.timers("exec sleep 60")
    found = await find(timeout_s=0.2)
    for fd in systemd.silent:
        os.close(fd)
    assert {risk.detail for risk in found} == {"cannot tell: no answer within 0.2 s"}
    assert [risk.kind for risk in found] == ["fanotify", "timer", "multipath"]


async def test_who_talks_for_ever_is_not_listened_to(find: Find, systemd: FakeSystemd) -> None:
    systemd.timers("exec yes")
    assert await find({}) == [Risk("timer", "cannot tell: the answer is too long")]


async def test_what_was_told_just_now_is_not_asked_again(find: Find, systemd: FakeSystemd) -> None:
    systemd.maps = f"mpatha: 0 8 multipath 1 queue_if_no_path {PATHS}\n"
    systemd.timers(f"cat <<'END'\n{show('logrotate.timer', utc(30))}END")
    told = await find(max_age_s=300)
    assert [risk.kind for risk in told] == ["timer", "multipath"]
    systemd.timers("exit 1")
    assert [risk.kind for risk in await find(max_age_s=300)] == ["timer", "multipath"]
    assert len(systemd.units) == 2
    assert (await find())[0].detail == "cannot tell: systemctl exits with 1"
    assert len(systemd.units) == 4


async def test_a_timer_that_was_due_since_is_asked_for_anew(find: Find, systemd: FakeSystemd) -> None:
    systemd.timers(f"cat <<'END'\n{show('logrotate.timer', utc(-5))}END")
    assert [risk.kind for risk in await find({}, max_age_s=300)] == ["timer"]
    systemd.timers(f"cat <<'END'\n{show('logrotate.timer', utc(86400))}END")
    assert await find({}, max_age_s=300) == []


async def test_who_did_not_tell_is_asked_again(find: Find, systemd: FakeSystemd) -> None:
    systemd.error = BusError("no, not now")
    assert [risk.kind for risk in await find({}, max_age_s=300)] == ["fanotify"]
    systemd.error = None
    assert await find({}, max_age_s=300) == []
