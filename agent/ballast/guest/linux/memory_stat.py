"""Memory of a control group: its ``memory.stat``, Documentation/admin-guide/cgroup-v2.rst (Linux 6.1 and 6.12)."""

from __future__ import annotations

import re
from dataclasses import dataclass

_LINE = re.compile(r"^((?:in)?active_anon) (\d+)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class AnonLists:
    """Anonymous pages of the group on the lists that reclaim goes through, in bytes, as of the last two seconds."""

    active_bytes: int
    inactive_bytes: int


def parse_anon_lists(text: str) -> AnonLists:
    """Parse lines such as ``inactive_anon 268435456``; others are passed over. ValueError."""
    sizes = {name: int(number) for name, number in _LINE.findall(text)}
    try:
        return AnonLists(sizes["active_anon"], sizes["inactive_anon"])
    except KeyError as error:
        raise ValueError(f"memory.stat lacks the line {error}") from error
