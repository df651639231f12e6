"""Freezing under a lease, as peers see it: one session at a time, known by its id.

``begin`` and ``end`` may be repeated and give the same answer; another id is turned away while one is held. The
answer of an ended session is kept for an hour, across restarts of the agent.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections import deque
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ballast.guest.config import Config
from ballast.guest.events import Events
from ballast.guest.linux.tree import Tree
from ballast.guest.quiesce import guard_protocol, record
from ballast.guest.quiesce.forecast import Plan
from ballast.guest.quiesce.guard_protocol import boottime_s
from ballast.guest.quiesce.hold import Hold, Surroundings
from ballast.guest.quiesce.leftovers import restore_settings
from ballast.guest.quiesce.markers import MARKERS, left_in, see_undone, services_of
from ballast.guest.quiesce.outlook import Outlook, check_lease
from ballast.guest.quiesce.prelude import Order
from ballast.guest.quiesce.recovery import clean_up
from ballast.guest.quiesce.writers import Finder, Writers
from ballast.wire.errors import BadRequest, Busy, KernelFailure, LeaseExpired, NoSuchId
from ballast.wire.names import (
    EndReason,
    FilesystemResult,
    ProcessState,
    QuiesceBegun,
    QuiesceEnded,
    QuiesceRenewed,
    QuiesceStatus,
    WriterResult,
)
from ballast.wire.shape import read_record, to_wire

log = logging.getLogger(__name__)

_ID_MAX = 128
_GUARD_CGROUP = "sys/fs/cgroup/ballast.slice/ballast-guard.service/cgroup.procs"
_QGA_PREFIX = "qga-"


class Quiesce:
    """The guest's one freeze. ``run`` must be running for any of it to work.

    ``find_writers`` says who takes part, at the start of each.
    """

    def __init__(
        self,
        tree: Tree,
        events: Events,
        config: Config,
        find_writers: Finder,
        *,
        record_path: Path = record.PATH,
        guard_path: str = guard_protocol.SOCKET_PATH,
        markers: Path = MARKERS,
    ) -> None:
        self.outlook = Outlook(tree, config.quiesce)
        self._tree = tree
        self._events = events
        self._config = config
        self._find_writers = find_writers
        self._markers = markers
        self._record_path = record_path
        self._record = record.Record()
        self._around = Surroundings(config.quiesce, self.outlook, guard_path, self._opening, self._changed)
        self._current: Hold | None = None
        # A begin can come after its own end, over another connection: nobody waits for it any more.
        self._ended_unbegun: deque[str] = deque(maxlen=64)
        self._recovered = asyncio.Event()
        self._new = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def is_frozen(self) -> bool:
        """Whether a file system may be frozen by us: from before the first FIFREEZE until after the last FITHAW."""
        return self._current is not None and self._current.is_holding

    async def run(self) -> None:
        """Clean up after an agent that died, then carry each session through."""
        restore_settings()
        await self._recover()
        self._recovered.set()
        while True:
            await self._new.wait()
            self._new.clear()
            if self._current is not None:
                await self._current.run()
                restore_settings()  # the guard's cleaner may be killed with it
                self._close_record()
                self._current = None
                self._idle.set()

    async def wait_recovered(self) -> None:
        """Wait until nothing is frozen any more that an earlier agent had frozen."""
        await self._recovered.wait()

    async def begin(
        self,
        session_id: str,
        lease_ms: int,
        *,
        mountpoints: Collection[str] | None = None,
        exclude: Collection[str] = (),
        degrade: bool = False,
        with_writers: bool = True,
    ) -> QuiesceBegun:
        """Freeze, and hold for ``lease_ms``. BadRequest, Busy, KernelFailure, DeadlineExceeded, LeaseExpired.

        Or WriterRefused; unless it is to ``degrade``, every failure leaves all thawed and all writers undone.
        """
        if not 0 < len(session_id) <= _ID_MAX:
            raise BadRequest(f"Parameter 'id' expects 1 to {_ID_MAX} characters", argument="id")
        check_lease(lease_ms)
        await self._settle()
        if self._current is not None and self._current.order.id == session_id:
            return await asyncio.shield(self._current.begun)
        self._refuse_while_held()
        if session_id in self._ended_unbegun:
            raise LeaseExpired("the session was ended before it began")
        if session_id in self._record.answers:
            raise BadRequest("Parameter 'id' names a session that has ended", argument="id")
        plan = self.outlook.plan(mountpoints, exclude)
        return await self._start(Order(session_id, lease_ms / 1000, degrade), plan, with_writers=with_writers)

    async def renew(self, session_id: str, lease_ms: int) -> QuiesceRenewed:
        """Let the lease end ``lease_ms`` from now. LeaseExpired if it has ended, NoSuchId."""
        check_lease(lease_ms)
        await self._recovered.wait()
        if self._current is None or self._current.order.id != session_id:
            if session_id in self._record.answers:
                raise LeaseExpired("the freeze has ended")
            raise NoSuchId(f"no freeze has the id {session_id}")
        await self._current.renew(lease_ms / 1000)
        return QuiesceRenewed(lease_ms)

    async def end(self, session_id: str, *, reason: EndReason | None = None) -> QuiesceEnded:
        """Thaw, and tell whether everything stayed frozen until now. NoSuchId."""
        if self._current is not None and self._current.order.id == session_id:
            self._current.order_end(reason)
            return await asyncio.shield(self._current.ended)
        await self._recovered.wait()
        answer = self._record.answers.get(session_id)
        if answer is None:
            self._ended_unbegun.append(session_id)
            raise NoSuchId(f"no freeze has the id {session_id}")
        return read_record(QuiesceEnded, answer["ended"])

    def guard_state(self) -> ProcessState:
        """Whether the guard holds something, waits for work or is not running; from its cgroup, without asking it."""
        if self._current is not None:
            return "active"
        try:
            return "idle" if self._tree.read(_GUARD_CGROUP) else "stopped"
        except OSError:
            return "stopped"

    def status(self) -> QuiesceStatus:
        """What is, not what was asked for."""
        hold = self._current
        if hold is None:
            return QuiesceStatus("thawed")
        left_ms = max(0, round(1000 * (hold.expires_s - boottime_s()))) if hold.expires_s else None
        return QuiesceStatus(hold.state, hold.order.id, left_ms, hold.outcome.filesystems)

    # The QEMU guest agent's commands drive the same machine.

    async def qga_freeze(self, mountpoints: Collection[str] | None) -> int:
        """Freeze for the configured lease; number of file systems, of which unknown ones are ignored (QGA schema)."""
        await self._settle()
        self._refuse_while_held()
        session_id = _QGA_PREFIX + str(uuid.uuid4())
        plan = self.outlook.plan(mountpoints, (), strict=False)
        begun = await self._start(Order(session_id, self._config.quiesce.lease_ms / 1000), plan)
        count = _count(begun.filesystems, "frozen")
        if count == 0:  # nothing was frozen, so nobody will ask for the thaw
            await self.end(session_id)
        return count

    async def qga_thaw(self) -> int:
        """Thaw whatever session there is; number of file systems. LeaseExpired, once, if the lease did it before."""
        hold = self._current
        if hold is not None:
            ended = await self.end(
                hold.order.id, reason=None if hold.order.id.startswith(_QGA_PREFIX) else "thawed-by-qga"
            )
            self._record.answers.get(hold.order.id, {})["unreported"] = False
            if ended.reason not in ("lease-expired", "guard-lost"):
                return _count(ended.filesystems, "thawed")
            raise LeaseExpired(f"the file systems were thawed before: {ended.reason}")
        await self._recovered.wait()
        for answer in self._record.answers.values():
            if answer["unreported"]:
                answer["unreported"] = False
                self._write_record()
                reason = answer["ended"].get("reason")
                raise LeaseExpired(f"the file systems were thawed before this command came: {reason}")
        return 0

    async def close(self) -> None:
        """Thaw what is held, before the agent leaves; bounded by the guard's and the net's own deadlines."""
        if self._current is not None:
            self._current.order_end("agent-restarted")
            await asyncio.wait([self._current.ended], timeout=10)

    async def _settle(self) -> None:
        """Wait for what is only finishing: the clean-up after an earlier agent, a session that has thawed."""
        await self._recovered.wait()
        if not self.is_frozen:
            await self._idle.wait()

    def _refuse_while_held(self) -> None:
        if self._current is not None:
            left_ms = self.status().lease_left_ms
            held = self._current.order.id
            raise Busy(f"a freeze is held by {held}", id=held, **({"lease-left-ms": left_ms} if left_ms else {}))

    async def _start(self, order: Order, plan: Plan, *, with_writers: bool = True) -> QuiesceBegun:
        find = self._find_writers if with_writers and self._config.writers.enabled else list
        timeout_s = self._config.writers.timeout_ms / 1000
        writers = Writers(find, self._config.writer, order.id, timeout_s=timeout_s)
        self._current = Hold(order, plan, writers, self._around)
        self._idle.clear()
        self._new.set()
        return await asyncio.shield(self._current.begun)

    # The record in /run, and what it is for.

    def _opening(self, hold: Hold, guard_pid: int) -> None:
        try:
            start = record.process_start(guard_pid)
            self._record.open = record.Open(hold.order.id, guard_pid, start, hold.left_to_thaw())
            record.write_record(self._record_path, self._record)
        except OSError as error:
            raise KernelFailure.of("write", self._record_path, error) from error

    def _changed(self, hold: Hold, reason: EndReason | None) -> None:
        data: dict[str, Any] = {"id": hold.order.id, "state": hold.state}
        if hold.ended.done():
            by_itself = reason is not None and hold.order.id.startswith(_QGA_PREFIX)
            ended = to_wire(hold.ended.result())
            self._record.remember(hold.order.id, ended, now_s=boottime_s(), unreported=by_itself)
            self._write_record()
            data["state"] = "thawed"
        elif hold.state == "frozen" and self._record.open is not None:
            left = hold.left_to_thaw()
            if left != self._record.open.filesystems:  # without what a stranger has frozen
                self._record.open.filesystems = left
                self._write_record()
        fields = {"FREEZE_ID": hold.order.id, "FREEZE_STATE": data["state"]}
        log.info("freeze %s is %s%s", hold.order.id, data["state"], f": {reason}" if reason else "", extra=fields)
        self._events.publish("BALLAST_QUIESCE", data | ({"reason": reason} if reason else {}))

    def _close_record(self) -> None:
        if self._record.open is not None:
            self._record.open = None
            self._write_record()

    def _write_record(self) -> None:
        try:
            record.write_record(self._record_path, self._record)
        except OSError as error:
            log.warning("cannot write %s, ignoring: %s", self._record_path, error)

    async def _recover(self) -> None:
        """End a session that an earlier agent left open. The guard has thawed it, unless it is gone or stuck too."""
        try:
            self._record = record.read_record(self._record_path)
        except (OSError, ValueError) as error:
            log.warning("cannot read %s, ignoring: %s", self._record_path, error)
        left = self._record.open
        if left is None:
            await see_undone(self._markers)
            return
        found = await clean_up(left, self._around.guard_path)
        names = [*await see_undone(self._markers), *(mark.name for mark in left_in(services_of(self._markers)))]
        lost = [WriterResult(name, "lost", "the agent was restarted") for name in names]
        filesystems = [FilesystemResult(one.mountpoint, "", "", "thawed") for one in found if one.thawed]
        ended = QuiesceEnded(False, 0.0, 0.0, "agent-restarted", filesystems, lost)
        unreported = left.id.startswith(_QGA_PREFIX)
        self._record.open = None
        if left.id not in self._record.answers:
            self._record.remember(left.id, to_wire(ended), now_s=boottime_s(), unreported=unreported)
        self._write_record()
        log.warning("freeze %s was ended by a restart of the agent: %s", left.id, asdict(ended))


def _count(filesystems: list[FilesystemResult], state: str) -> int:
    return sum(1 for one in filesystems if one.state == state)
