"""A writer that is a program: it runs in a transient unit of its own and speaks JSON lines on its standard streams.

The unit outlives the agent. When its process ends, its ``ExecStopPost=`` (packaging/scripts/ballast-writer-undo) asks
over the same socket whether the writer was undone, and starts it again with an ``abort`` if it was not; without an
agent the marker in /run tells it, which stands there from before ``prepare`` until the undoing is answered.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from ballast.guest.bus import BusError, Variant
from ballast.guest.quiesce.markers import CGROUPS, MARKERS, kill, unit_of, write_marker
from ballast.guest.quiesce.writer import (
    ANSWER_LIMIT_BYTES,
    Description,
    Verb,
    WriterEnded,
    WriterFailed,
    WriterTimedOut,
    read_answer,
    read_description,
)
from ballast.guest.quiesce.writer_files import what_is_missing, why_unsafe
from ballast.guest.threads import in_thread
from ballast.guest.units import command_line, start_unit

PROTOCOL = 1

_UNDO = "/usr/lib/ballast/ballast-writer-undo"
_RETRY_S = 0.1
_KILL_S = 5.0  # for systemd to see that what was killed is dead
_STOP_S = 60.0  # for an abort that no agent bounds, since it is dead
_SIGKILL = 9
_UNDOING = ("thaw", "abort")

Starter = Callable[[str, dict[str, Variant], int], Awaitable[None]]


async def _start(name: str, properties: dict[str, Variant], stdio_fd: int) -> None:
    await start_unit(name, properties, stdio_fd=stdio_fd)


class WriterProcess:
    """A ``Writer``, by the path of its program."""

    def __init__(
        self, path: Path, *, markers: Path = MARKERS, cgroups: Path = CGROUPS, start: Starter = _start
    ) -> None:
        self.name = path.name
        self._path = path
        self._marker = markers / path.name
        self._cgroup = cgroups / unit_of(path.name)
        self._start_unit = start
        self._sock: socket.socket | None = None
        self._procs_fd = -1
        self._buffer = b""
        self._session: dict[str, Any] = {}
        self._user = "root"
        self._is_suspect = False  # it may be doing what nobody waits for any more
        self._is_ended = False  # its process; the unit still has its ExecStopPost=

    async def start(self, session_id: str, config: dict[str, Any], *, timeout_s: float) -> Description:
        """See ``Writer``. As root first: who it wants to be it says when it is asked."""
        deadline_s = time.monotonic() + timeout_s
        self._session = {"id": session_id, "config": config}
        missing = await self._look(timeout_s)
        if missing:
            return Description(absent=missing)
        user = str(config.get("user", "root"))
        description = await self._identify(user, deadline_s)
        if description.user != user and description.absent is None:
            self.close()
            description = await self._identify(description.user, deadline_s)
        return description

    async def ask(self, verb: Verb, *, timeout_s: float, **arguments: Any) -> dict[str, Any]:
        """See ``Writer``."""
        if self._is_ended:
            raise WriterEnded("it has ended")
        if self._is_suspect:
            raise WriterTimedOut("it is still busy with what it was asked before")
        if verb == "prepare":
            request = {"verb": "abort", **self._session, "deadline-ms": round(1000 * _STOP_S)}
            write_marker(self._marker, request)
        try:
            answer = await self._exchange({"verb": verb, "id": self._session["id"], **arguments}, timeout_s)
        except (WriterEnded, WriterTimedOut):
            raise
        except WriterFailed:
            self._undone(verb)
            raise
        self._undone(verb)
        return answer

    async def force_abort(self, *, timeout_s: float) -> None:
        """See ``Writer``. Killed if it has not ended, and then started again by its own unit, or by a new one."""
        if not self._is_ended:
            kill(self._cgroup)
            await self._wait_for(self._hear_end(), _KILL_S, "it was killed, and systemd does not see it dead")
        if self._sock is None:  # it ended without a word: whatever ended it has ended its ExecStopPost= as well
            properties = self._properties(self._user)
            properties["ExecStart"] = properties.pop("ExecStopPost")
            await self._run(properties, time.monotonic() + timeout_s)
        with contextlib.suppress(WriterEnded):
            await self._send({"verdict": "undo"})
        try:
            await self._wait_for(self._hear_hangup(), timeout_s, f"its abort did not end within {timeout_s:g} s")
        except WriterFailed:
            kill(self._cgroup)
            self._undone("abort")
            raise
        self._undone("abort")

    def lifeline(self) -> tuple[int, int] | None:
        """See ``Writer``."""
        return (self._sock.fileno(), self._procs_fd) if self._sock is not None and self._procs_fd >= 0 else None

    def close(self) -> None:
        """See ``Writer``. One that hangs is killed; its unit starts nothing, for there is no marker."""
        if self._is_suspect and not self._is_ended:
            kill(self._cgroup)
        if self._sock is not None:
            self._sock.close()
            self._sock = None
        if self._procs_fd >= 0:
            os.close(self._procs_fd)
            self._procs_fd = -1
        self._buffer = b""

    # Starting it.

    async def _look(self, timeout_s: float) -> str | None:
        """What it needs and is missing; WriterFailed if it must not be run."""

        def look() -> tuple[str | None, str | None]:
            unsafe = why_unsafe(self._path)
            return unsafe, None if unsafe else what_is_missing(self._path, self._session["config"])

        try:
            async with asyncio.timeout(timeout_s):
                unsafe, missing = await in_thread(look, name="quiesce-writer")
        except (OSError, TimeoutError) as error:
            raise WriterFailed(f"cannot look at {self._path}: {error}") from error
        if unsafe:
            raise WriterFailed(f"is not run: {unsafe}")
        return missing

    async def _identify(self, user: str, deadline_s: float) -> Description:
        self._user = user
        await self._run(self._properties(user), deadline_s)
        request = {"verb": "identify", "protocol": PROTOCOL, **self._session}
        answer = await self._exchange(request, deadline_s - time.monotonic())
        with contextlib.suppress(OSError):  # no unified hierarchy: it can only be hung up on
            self._procs_fd = os.open(self._cgroup / "cgroup.procs", os.O_RDONLY | os.O_CLOEXEC)
        return read_description({"user": user} | answer, self._session["config"])

    async def _run(self, properties: dict[str, Variant], deadline_s: float) -> None:
        """Start the unit with a new socket to it."""
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        self._sock = ours
        with theirs:
            await self._start(properties, theirs.fileno(), deadline_s)

    async def _start(self, properties: dict[str, Variant], stdio_fd: int, deadline_s: float) -> None:
        """Start the unit; one of an earlier session, or as another user, may still be leaving."""
        while True:
            try:
                await self._start_unit(unit_of(self.name), properties, stdio_fd)
            except BusError as error:
                if "UnitExists" not in str(error) or time.monotonic() + _RETRY_S >= deadline_s:
                    raise WriterFailed(f"cannot be started: {error}") from error
            except (OSError, TimeoutError) as error:
                raise WriterFailed(f"cannot be started: {str(error) or 'systemd does not answer'}") from error
            else:
                return
            await asyncio.sleep(_RETRY_S)

    def _properties(self, user: str) -> dict[str, Variant]:
        program = str(self._path)
        properties = {
            "Description": Variant("s", f"Ballast writer {self.name}"),
            "Slice": Variant("s", "ballast.slice"),
            "Type": Variant("s", "exec"),
            "CollectMode": Variant("s", "inactive-or-failed"),
            "ExecStart": command_line([program]),
            "ExecStopPost": command_line([_UNDO, str(self._marker), program]),
            "TimeoutStopUSec": Variant("t", round(1e6 * _STOP_S)),
            # What a writer that ended leaves running must not hold up its abort.
            "KillSignal": Variant("i", _SIGKILL),
            "RuntimeDirectory": Variant("as", [f"ballast-writer-{self.name}"]),
            # It is the descriptor. Were it said to be the journal too, the default, systemd would take one for both.
            "StandardOutput": Variant("s", "null"),
            "StandardError": Variant("s", "journal"),
            "SyslogIdentifier": Variant("s", self.name),
            "LimitCORE": Variant("t", 0),
        }
        return properties if user == "root" else properties | {"User": Variant("s", user)}

    # Speaking with it.

    async def _exchange(self, request: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        verb, timeout_s = request["verb"], max(0.0, timeout_s)
        request["deadline-ms"] = round(1000 * timeout_s)
        try:
            async with asyncio.timeout(timeout_s):
                await self._send(request)
                return read_answer(await self._read_line())
        except TimeoutError as error:
            self._is_suspect = True
            raise WriterTimedOut(f"did not answer {verb} within {timeout_s:.1f} s") from error
        except asyncio.CancelledError:
            self._is_suspect = True
            raise

    async def _send(self, message: dict[str, Any]) -> None:
        if self._sock is None:
            raise WriterEnded("it is gone")
        try:
            await asyncio.get_running_loop().sock_sendall(self._sock, json.dumps(message).encode() + b"\n")
        except OSError as error:
            raise self._hung_up() from error

    async def _read_line(self) -> bytes:
        """The next line that is not empty. WriterEnded when it tells that its process has ended, or hangs up."""
        while True:
            line, newline, rest = self._buffer.partition(b"\n")
            if not newline:
                await self._read_more()
                continue
            self._buffer = rest
            if line.startswith(b'{"ended"'):
                self._is_ended = True
                raise WriterEnded(f"it has ended: {read_answer(line)['ended']}")
            if line.strip():
                return line

    async def _read_more(self) -> None:
        if self._sock is None:
            raise WriterEnded("it is gone")
        if len(self._buffer) > ANSWER_LIMIT_BYTES:
            self._is_suspect = True
            self._buffer = b""
            raise WriterFailed(f"answered more than {ANSWER_LIMIT_BYTES} bytes")
        try:
            data = await asyncio.get_running_loop().sock_recv(self._sock, ANSWER_LIMIT_BYTES)
        except OSError:
            data = b""
        if not data:
            raise self._hung_up()
        self._buffer += data

    def _hung_up(self) -> WriterEnded:
        self._is_ended = True
        if self._sock is not None:
            self._sock.close()
            self._sock = None
        return WriterEnded("it has ended")

    async def _hear_end(self) -> None:
        while not self._is_ended:
            with contextlib.suppress(WriterFailed):
                await self._read_line()

    async def _hear_hangup(self) -> None:
        while self._sock is not None:
            with contextlib.suppress(WriterFailed):
                await self._read_line()

    async def _wait_for(self, waiting: Awaitable[None], timeout_s: float, otherwise: str) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                await waiting
        except TimeoutError as error:
            raise WriterFailed(otherwise) from error

    def _undone(self, verb: str) -> None:
        if verb in _UNDOING:
            self._marker.unlink(missing_ok=True)
