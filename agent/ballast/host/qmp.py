"""A QMP connection to QEMU, by the library qemu.qmp: commands with a deadline, and errors of ours.

Only here is that library imported, and only when somebody connects: status, watch, freeze and thaw do without it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Self

from ballast.host import linux
from ballast.host.connect import NoAnswer, PeerGone
from ballast.host.machine import NotReclaimable, QmpFailed

if TYPE_CHECKING:
    from qemu.qmp import EventListener, QMPClient

ANSWER_TIMEOUT_S = 30.0  # QEMU's main loop can be busy
CONNECT_TIMEOUT_S = 10.0
_CLOSE_TIMEOUT_S = 5.0
_LIBVIRT = ("libvirtd", "virtqemud")


class Qmp:
    """A connection; made by ``connect``. ``pid`` is whoever listens there: QEMU, unless somebody else opened it."""

    def __init__(self, path: str, pid: int, client: QMPClient) -> None:
        self.path = path
        self.pid = pid
        self._client = client

    @classmethod
    @contextlib.asynccontextmanager
    async def connect(cls, path: str) -> AsyncIterator[Self]:
        """Connect to a UNIX socket, PATH or ``unix:PATH``. PeerGone, NoAnswer; NotReclaimable without the library."""
        try:
            from qemu.qmp import QMPClient, QMPError
        except ImportError as error:
            raise NotReclaimable("this needs the Python library qemu.qmp, which is not installed") from error
        # What it would log is what we raise.
        logging.getLogger("qemu.qmp").setLevel(logging.CRITICAL + 1)
        path = path.removeprefix("unix:")
        client = QMPClient()
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                await asyncio.get_running_loop().sock_connect(sock, path)
                pid = linux.peer_pid(sock)
                await client.connect(sock)
        except BaseException as error:
            sock.close()
            if isinstance(error, TimeoutError):
                # QEMU serves one client at a time, and lets the others wait without a word.
                raise NoAnswer(f"{path}: no greeting within {CONNECT_TIMEOUT_S:g} s; is this QMP in use?") from error
            if isinstance(error, (OSError, QMPError)):
                raise PeerGone(f"{path}: no QMP: {error}") from error
            raise
        try:
            _check_owner(path, pid)
            yield cls(path, pid, client)
        finally:
            with contextlib.suppress(QMPError, EOFError, OSError):
                async with asyncio.timeout(_CLOSE_TIMEOUT_S):
                    await client.disconnect()

    async def run(self, command: str, **arguments: Any) -> Any:
        """Run a command; ``node_name=`` is QMP's ``node-name``. QmpFailed, NoAnswer, PeerGone."""
        from qemu.qmp import ExecuteError, QMPError

        dashed = {name.replace("_", "-"): value for name, value in arguments.items()}
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                return await self._client.execute(command, dashed)
        except ExecuteError as error:
            raise QmpFailed(f"QEMU refused {command}: {error}") from error
        except TimeoutError as error:
            raise NoAnswer(f"{self.path}: no answer to {command} within {ANSWER_TIMEOUT_S:g} s") from error
        except (QMPError, OSError, EOFError) as error:
            raise PeerGone(f"{self.path}: QEMU is gone: {error}") from error

    async def ask_monitor(self, line: str) -> str:
        """Run a command of the monitor for people; its text with plain newlines."""
        text = await self.run("human-monitor-command", command_line=line)
        if not isinstance(text, str):
            raise QmpFailed(f"QEMU answered {line!r} with no text")
        return text.replace("\r\n", "\n")

    def listening(self, names: Sequence[str]) -> AbstractContextManager[EventListener]:
        """Keep events of these names, in order with the answers: what came before an answer is there with it."""
        return self._client.listener(list(names))


def _check_owner(path: str, pid: int) -> None:
    """Refuse a socket that libvirt opened for its QEMU; any other stranger is found out by its memory."""
    try:
        name = linux.process_name(pid)
    except OSError as error:
        raise NotReclaimable(f"{path} was opened by process {pid}, which is not here any more") from error
    if name in _LIBVIRT:
        raise NotReclaimable(f"{path} is {name}'s: nothing is changed behind libvirt's back")
