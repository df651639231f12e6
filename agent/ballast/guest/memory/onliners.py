"""Who else brings hot-added memory online in this guest. Such a one is let go first: two would only be in each
other's way, and leave a DIMM in two zones.
"""

from __future__ import annotations

import contextlib
import logging

from ballast.guest.linux.memory_hotplug import AUTO_ONLINE, RULES, VENDOR, parse_onlining_rule
from ballast.guest.linux.tree import Tree

log = logging.getLogger(__name__)


class Onliners:
    """The rules are read once, at the start: no disk is needed when memory comes."""

    def __init__(self, tree: Tree) -> None:
        self._tree = tree
        self._rule = _find_rule(tree)
        self._told = ""

    def find(self) -> str:
        """Who it is, for the journal, which is told when that has changed; empty if nobody. May run while frozen."""
        who = ""
        with contextlib.suppress(OSError):  # no memory hot-plug
            if (policy := self._tree.read(AUTO_ONLINE)) != "offline":
                who = f"the kernel (auto_online_blocks: {policy})"
        who = who or (self._rule and f"udev ({self._rule})")
        if who and who != self._told:
            log.info("%s brings hot-added memory online here: the agent takes what stays offline", who)
        self._told = who
        return who

    def disprove_rule(self) -> None:
        """The rule had its chance and did nothing: it is not waited for any more."""
        if self._rule:
            log.info("udev (%s) does not bring memory online here: the agent does", self._rule)
        self._rule = ""


def _find_rule(tree: Tree) -> str:
    """The first file of rules that may do it; a file hides those of the same name in later folders."""
    vendor, seen = "", set[str]()
    with contextlib.suppress(OSError):
        vendor = tree.read(VENDOR)
    for folder in RULES:
        for name in tree.names(folder):
            if name.endswith(".rules") and name not in seen:
                seen.add(name)
                with contextlib.suppress(OSError):
                    if parse_onlining_rule(tree.read(f"{folder}/{name}"), vendor):
                        return f"/{folder}/{name}"
    return ""
