"""The figures of an idle guest: reading what the watcher in the guest wrote."""

from __future__ import annotations

from tests.vm.idle import Cost, broken_promises, parse_looks

LOOK = """\
process 455 ballastd
ran: 1500000
voluntary_ctxt_switches:\t219
nonvoluntary_ctxt_switches:\t32
ran: 500000
voluntary_ctxt_switches:\t7
nonvoluntary_ctxt_switches:\t1
Rss:               30288 kB
Pss:               24253 kB
Anonymous:         17684 kB
process 460 a b
ran: 1000000
voluntary_ctxt_switches:\t1
nonvoluntary_ctxt_switches:\t0
Rss:                 100 kB
Pss:                  50 kB
Anonymous:            10 kB
fed 104000000
"""


def test_all_threads_of_a_process_are_counted_together() -> None:
    looks, fed_us = parse_looks(LOOK)
    assert looks[455] == Cost("ballastd", 2, 226, 33, 2.0, 30288 << 10, 24253 << 10, 17684 << 10)
    assert looks[460].name == "a b"
    assert fed_us == 104_000_000


def test_what_it_took_is_a_difference_and_what_it_has_is_not() -> None:
    before = parse_looks(LOOK)[0][455]
    after = parse_looks(LOOK.replace("219", "223").replace("24253", "24000").replace("1500000", "1750000"))[0][455]
    took = after.since(before)
    assert (took.wake_ups, took.preempted, took.cpu_ms, took.pss_bytes) == (4, 0, 0.25, 24000 << 10)
    assert took.without(1 << 20).rss_bytes == took.rss_bytes - (1 << 20)


def test_more_than_is_promised_is_told() -> None:
    agent = Cost("ballastd", 2, 4, 0, 1.0, 0, 20 << 20, 0)
    assert broken_promises("bookworm", [agent], 4) == []
    assert broken_promises("bookworm", [agent], 3) == ["4 wake-ups, of which 3 for the watchdog"]
    larger = Cost("ballastd", 2, 4, 0, 1.0, 0, (24 << 20) + 1, 0)
    assert broken_promises("trixie", [larger], 4) == ["24.0 MiB, not 24"]
