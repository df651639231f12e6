"""Whose stalls make the level: the top-level control groups other than ours, and those that were chosen.

/proc/pressure/memory cannot leave out what our own inflating makes wait, nor kswapd, which counts as stalled for as
long as it reclaims (balance_pgdat in mm/vmscan.c); ballast.slice's siblings can. They come and go (user.slice with the
first login), and inotify tells of it, so that nothing has to be looked at in between.
Documentation/admin-guide/cgroup-v2.rst and accounting/psi.rst.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Callable, Sequence
from functools import partial

from ballast.guest.linux.inotify import Folders
from ballast.guest.linux.psi import StallFile, parse_stalls
from ballast.guest.linux.tree import Tree
from ballast.guest.memory.trigger import Trigger
from ballast.wire.memory_names import PsiTrigger, StallKind

log = logging.getLogger(__name__)

ROOT = "sys/fs/cgroup"
OURS = "ballast.slice"
OUR_FILE = f"{ROOT}/{OURS}/memory.pressure"
# PID 1 by itself: when it waits all of its group do, and that is no more than some task that waits.
SINGLE = "init.scope"


class Groups:
    """``read`` at any time; between ``watch`` and ``close`` each group also has the triggers."""

    def __init__(self, tree: Tree, chosen: Sequence[str], triggers: Sequence[PsiTrigger]) -> None:
        self._tree = tree
        self._chosen = chosen
        self._triggers = triggers
        self._armed: dict[tuple[str, int], list[Trigger]] = {}
        self._folders: Folders | None = None
        self._fired: Callable[[StallKind], None] = lambda _kind: None

    def read(self) -> dict[str, StallFile]:
        """The stalls of each group that is there; none without cgroup v2 or where it measures none."""
        stalls = {}
        for name, _ in self._armed if self._folders is not None else self._find():
            with contextlib.suppress(OSError, ValueError):  # gone this moment
                stalls[name] = parse_stalls(self._tree.read(f"{ROOT}/{name}/memory.pressure"))
        return stalls

    def watch(self, fired: Callable[[StallKind], None]) -> None:
        """Call ``fired`` for each trigger that fires, in groups to come as well. Never blocks, never raises."""
        self._fired = fired
        if self._tree.exists(f"{ROOT}/cgroup.controllers"):
            try:
                self._folders = Folders()
                asyncio.get_running_loop().add_reader(self._folders.fileno(), self._look_again)
            except OSError as error:
                log.warning("control groups to come will not count for the pressure level: %s", error)
        self._look_again()

    def close(self) -> None:
        """Disarm all."""
        for triggers in self._armed.values():
            _close(triggers)
        self._armed.clear()
        if self._folders is not None:
            asyncio.get_running_loop().remove_reader(self._folders.fileno())
            self._folders.close()
            self._folders = None

    @property
    def is_armed(self) -> bool:
        """Whether any group has its triggers now."""
        return any(self._armed.values())

    def _look_again(self) -> None:
        if self._folders is not None:
            self._folders.drain()
            for parent in {"", *map(self._parent_of, self._chosen)}:
                with contextlib.suppress(OSError):  # gone since: what is above it tells
                    self._folders.watch(self._tree.path(f"{ROOT}/{parent}"))
        found = self._find()
        for group in self._armed.keys() - set(found):
            _close(self._armed.pop(group))
        for group in found:
            if group not in self._armed:
                self._armed[group] = self._arm(group)

    def _find(self) -> list[tuple[str, int]]:
        """The groups that are there, each with its inode: a later one of the same name is another."""
        names = [name for name in self._tree.names(ROOT) if _is_group(name) and name != OURS]
        found = []
        for name in dict.fromkeys([*names, *self._chosen]):
            with contextlib.suppress(OSError):
                found.append((name, os.stat(self._tree.path(f"{ROOT}/{name}/memory.pressure")).st_ino))  # noqa: PTH116
        return found

    def _parent_of(self, name: str) -> str:
        """The folder in which a chosen group, or what leads to it, would appear."""
        parent = name.rpartition("/")[0]
        while parent and not self._tree.exists(f"{ROOT}/{parent}"):
            parent = parent.rpartition("/")[0]
        return parent

    def _arm(self, group: tuple[str, int]) -> list[Trigger]:
        triggers: list[Trigger] = []
        path = self._tree.path(f"{ROOT}/{group[0]}/memory.pressure")
        try:
            for wanted in self._triggers:
                if wanted.kind == "full" and group[0] == SINGLE:
                    continue
                fired, gone = partial(self._fire, wanted.kind), partial(self._drop, group)
                triggers.append(Trigger(path, wanted, fired, gone))
        except OSError as error:
            _close(triggers)
            log.warning("no pressure events of the control group %s: %s", group[0], error)
            return []
        return triggers

    def _fire(self, kind: StallKind) -> None:
        """Peers' own triggers fire at the same moment, and they hear first."""
        asyncio.get_running_loop().call_soon(self._fired, kind)

    def _drop(self, group: tuple[str, int]) -> None:
        _close(self._armed.pop(group, []))


def _is_group(name: str) -> bool:
    """Whether a name in the root is that of a group with processes; its files all have a dot, and mounts have none."""
    return "." not in name or name.endswith((".slice", ".scope", ".service"))


def _close(triggers: Sequence[Trigger]) -> None:
    for trigger in triggers:
        trigger.close()
