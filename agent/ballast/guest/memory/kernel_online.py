"""Hot-added memory brought online by the kernel itself, where the configuration wants that (``online = "kernel"``).

Documentation/admin-guide/mm/memory-hotplug.rst: ``auto_online_blocks``, and for the zone the policy auto-movable, whose
ratio is set to that of our zone rule. The kernel knows nothing of our balloon. What was found is written down in /run
before it is changed, so that it can be put back by whoever comes next, though the agent was killed.
"""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path

from ballast.guest.linux import settings
from ballast.guest.linux.memory_hotplug import AUTO_ONLINE, MOVABLE_PERCENT, POLICY
from ballast.guest.linux.tree import Tree
from ballast.guest.memory.decisions import Decisions
from ballast.guest.memory.floor import MOVABLE_RATIO
from ballast.wire.errors import AgentError, KernelFailure, NotSupported

log = logging.getLogger(__name__)

MARK = settings.MARKS / "online-policy.json"


def arrange(tree: Tree, decisions: Decisions, *, is_wanted: bool, mark: Path = MARK) -> None:
    """Have it as the configuration wants it, from the agent's start on; where that cannot be, the agent does it."""
    if not is_wanted:
        if take_back(mark):
            decisions.note("policy-restored", "configured", 0)
        return
    try:
        hand_over(tree, mark)
    except AgentError as error:
        log.warning("the agent brings hot-added memory online, the kernel cannot: %s", error.desc)
    else:
        decisions.note("policy-set", "configured", 0, movable_percent=100 * MOVABLE_RATIO)


def hand_over(tree: Tree, mark: Path = MARK) -> None:
    """Have the kernel do it until ``take_back``. NotSupported without memory hot-plug, KernelFailure.

    A kernel without auto-movable (before 5.15) has all of it movable.
    """
    take_back(mark)
    values = {AUTO_ONLINE: "online"} if tree.exists(POLICY) else {AUTO_ONLINE: "online_movable"}
    if tree.exists(POLICY):
        values = {MOVABLE_PERCENT: str(100 * MOVABLE_RATIO), POLICY: "auto-movable", **values}
    try:
        before = {tree.path(name): tree.read(name) for name in reversed(values)}
    except FileNotFoundError as error:
        raise NotSupported("this kernel cannot bring hot-added memory online itself") from error
    try:
        settings.change(mark, {tree.path(name): value for name, value in values.items()}, before)
    except OSError as error:
        take_back(mark)
        raise KernelFailure.of("write", error.filename or str(mark), error) from error


def take_back(mark: Path = MARK) -> bool:
    """As it was before, if it was changed; whether it was. May be called by anybody, any number of times."""
    was_changed = mark.exists()
    with contextlib.suppress(OSError):
        settings.restore(mark)
    return was_changed


def main() -> int:
    """For the package's removal: nobody is there any more to put it back."""
    take_back()
    return 0
