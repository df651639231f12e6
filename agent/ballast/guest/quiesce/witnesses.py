"""What only others can tell of what stands in a freeze's way: systemd of its timers, two units of what we may not see.

The agent can neither look at other processes' descriptors (CAP_SYS_PTRACE) nor ask device-mapper for its tables
(/dev/mapper/control, by which one can also change them). So each is a standard tool that only reads, in a transient
unit that has that one right and no other, for seconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
import os
import socket
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Generic, TypeVar

from ballast.guest.bus import Variant
from ballast.guest.linux.fanotify import Mark, parse_permission_marks
from ballast.guest.units import command_line, start_unit

T = TypeVar("T")
Starter = Callable[..., Awaitable[None]]  # as start_unit

# include/uapi/linux/capability.h
_CAP_SYS_PTRACE, _CAP_SYS_ADMIN = 1 << 19, 1 << 21
_ANSWER_LIMIT_BYTES = 1 << 20
_LIFE_S = 10
_LOG_WARNING = 4
_KILL_S = 1.0

# Being able to read what PID 1 has open is the proof that nothing was hidden.
# grep fails where it finds nothing, or a process ends meanwhile.
_LIST_FANOTIFY = "read -r _ </proc/1/fdinfo/0 && echo all; grep -Hrs '^fanotify ' /proc/[0-9]*/fdinfo || :"
_LIST_MULTIPATH = ("/usr/sbin/dmsetup", "table", "--target", "multipath")
_LIST_TIMERS = ("systemctl", "show", "--property=Id,Persistent,NextElapseUSecRealtime", "*.timer")

_numbers = itertools.count(1)


class Kept(Generic[T]):
    """What somebody told, and when: asking costs PID 1 and us some time."""

    def __init__(self, ask: Callable[[], Awaitable[T]]) -> None:
        self._ask = ask
        self._asked_s = -math.inf
        self._telling: asyncio.Future[T] | None = None

    async def get(self, max_age_s: float) -> T:
        """Ask, unless it was asked within ``max_age_s``. BusError, OSError, TimeoutError, ValueError.

        Who gives up waiting leaves the question with whom it was put to: the answer is the next one's.
        """
        if self._telling is None or self._is_over(max_age_s):
            self._asked_s = time.monotonic()
            self._telling = asyncio.ensure_future(self._ask_in_time())
            self._telling.add_done_callback(lambda told: told.cancelled() or told.exception())  # heard, at least
        return await asyncio.shield(self._telling)

    def _is_over(self, max_age_s: float) -> bool:
        if self._telling is None or not self._telling.done():
            return False
        is_told = not self._telling.cancelled() and self._telling.exception() is None
        return not is_told or time.monotonic() - self._asked_s > max_age_s

    async def _ask_in_time(self) -> T:
        async with asyncio.timeout(_LIFE_S):
            return await self._ask()


class Witnesses:
    """``start`` starts a transient unit."""

    def __init__(self, start: Starter = start_unit) -> None:
        self._start = start
        self.permission_marks = Kept(self._list_permission_marks)
        self.queueing_maps = Kept(self._list_queueing_maps)
        self.timers = Kept(_list_timers)

    async def _list_permission_marks(self) -> list[Mark]:
        """What any process has to permit, by fanotify(7)."""
        limits = {
            # Of root's files it needs none, and of its one right nothing but to read in /proc.
            "User": Variant("s", "nobody"),
            "AmbientCapabilities": Variant("t", _CAP_SYS_PTRACE),
            "SystemCallFilter": Variant("(bas)", [False, ["@debug", "process_vm_readv", "process_vm_writev"]]),
        }
        text = await _ask_in_unit(("/bin/sh", "-c", _LIST_FANOTIFY), _CAP_SYS_PTRACE, limits, self._start)
        if not text.startswith("all\n"):
            raise ValueError("nobody lets us look at processes")
        return parse_permission_marks(text)

    async def _list_queueing_maps(self) -> dict[str, bool]:
        """All multipath maps, and whether each keeps what it cannot write for ever."""
        limits = {"DeviceAllow": Variant("a(ss)", [["/dev/mapper/control", "rw"]])}
        return parse_multipath(await _ask_in_unit(_LIST_MULTIPATH, _CAP_SYS_ADMIN, limits, self._start))


async def _list_timers() -> dict[str, float]:
    """When each persistent timer is due, in seconds since the epoch. By systemd's own socket: no bus is needed."""
    # Times in a form that depends on nothing.
    environment = {"PATH": os.environ.get("PATH", os.defpath), "TZ": "UTC", "LC_ALL": "C"}
    process = await asyncio.create_subprocess_exec(
        *_LIST_TIMERS,
        env=environment,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        assert process.stdout is not None
        text = await _read_text(process.stdout)
        if status := await process.wait():
            raise ValueError(f"{_LIST_TIMERS[0]} exits with {status}")
    finally:
        if process.returncode is None:
            process.kill()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_KILL_S):
                    await process.wait()
    return parse_timers(text)


def parse_timers(text: str) -> dict[str, float]:
    """Read systemctl's blocks of ``name=value`` lines; a time is ``Tue 2026-11-24 00:00:00 UTC``. ValueError."""
    due_s = {}
    for block in text.split("\n\n"):
        fields = dict(line.partition("=")[::2] for line in block.splitlines())
        due = fields.get("NextElapseUSecRealtime")
        if fields.get("Persistent") == "yes" and due and due != "n/a":
            moment = datetime.strptime(due, "%a %Y-%m-%d %H:%M:%S UTC").replace(tzinfo=UTC)
            due_s[fields.get("Id", "?")] = moment.timestamp()
    return due_s


def parse_multipath(text: str) -> dict[str, bool]:
    """Read dmsetup's lines, with the number of features before them (admin-guide/device-mapper/dm-mpath). ValueError.

    ``mpatha: 0 2097152 multipath 2 queue_if_no_path retain_attached_hw_handler 0 1 1 service-time 0 1 2 8:16 1 1``
    """
    queues = {}
    for line in text.splitlines():
        name, found, table = line.rpartition(": ")
        if found:
            _start, _sectors, _target, count, *words = table.split(" ")
            queues[name] = "queue_if_no_path" in words[: int(count)]
    return queues


async def _ask_in_unit(command: Sequence[str], capability: int, limits: Mapping[str, Variant], start: Starter) -> str:
    """What a command says on its standard output. Its unit has no mount namespace: making one touches every mount."""
    properties = {
        **limits,
        "Description": Variant("s", "Ballast looks for what stands in a freeze's way"),
        "ExecStart": command_line(command),
        "Slice": Variant("s", "ballast.slice"),
        "CollectMode": Variant("s", "inactive-or-failed"),
        "StandardError": Variant("s", "null"),
        "LogLevelMax": Variant("i", _LOG_WARNING),  # not that it started and ended
        "CapabilityBoundingSet": Variant("t", capability),
        "NoNewPrivileges": Variant("b", True),
        "RestrictAddressFamilies": Variant("(bas)", [True, ["AF_UNIX"]]),
        "DevicePolicy": Variant("s", "closed"),
        "LimitCORE": Variant("t", 0),
        "RuntimeMaxUSec": Variant("t", 1_000_000 * _LIFE_S),
    }
    ours, theirs = socket.socketpair()
    reader, writer = await asyncio.open_connection(sock=ours)
    try:
        with contextlib.closing(theirs):
            name = f"ballast-look-{os.getpid()}-{next(_numbers)}.service"
            await start(name, properties, stdio_fd=theirs.fileno())
        return await _read_text(reader)
    finally:
        writer.close()


async def _read_text(reader: asyncio.StreamReader) -> str:
    data = b""
    while chunk := await reader.read(_ANSWER_LIMIT_BYTES):
        data += chunk
        if len(data) > _ANSWER_LIMIT_BYTES:
            raise ValueError("the answer is too long")
    return data.decode(errors="surrogateescape")
