"""A control group's memory.stat: bad texts first, then real lines, then what later kernels may add."""

from __future__ import annotations

import pytest

from ballast.guest.linux.memory_stat import AnonLists, parse_anon_lists

# Debian 13's, of the holder with a balloon of 256 MiB.
REAL = "anon 274059264\nanon_thp 268435456\ninactive_anon 4096\nactive_anon 268435456\nactive_file 24576\n"


@pytest.mark.parametrize("text", ["", "garbage", "active_anon 1", "inactive_anon 1", "active_anon 1\ninactive_anon -1"])
def test_without_both_lists_it_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError, match="lacks the line"):
        parse_anon_lists(text)


def test_lists_are_told_apart() -> None:
    assert parse_anon_lists(REAL) == AnonLists(active_bytes=268435456, inactive_bytes=4096)
    assert parse_anon_lists(REAL + "later_active_anon 7\nactive_anon_later 7\n") == parse_anon_lists(REAL)
