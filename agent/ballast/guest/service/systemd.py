"""The agent as a systemd service: passed sockets, readiness, the watchdog, and a journal that never blocks.

Any file system can be frozen at any moment, by us or by a stranger, and then journald sleeps: so a journal line goes
through a bounded queue and a thread of its own, and a notification is sent without waiting.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import queue
import socket
import sys
import threading
from pathlib import Path

from ballast.guest.linux.notify import listen_fds, notify, watchdog_s
from ballast.guest.service import journal

_QUEUED_LINES = 1000
_FLUSH_S = 1.0
# Lines rest for a moment: journald would take the CPU from whoever is to make a snapshot, while writers stand still.
_REST_S = 0.1
_PRIORITIES = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3, logging.CRITICAL: 2}


class JournalHandler(logging.Handler):
    """Hands records to a thread that writes them: to the journal as fields, or to stderr when run by hand."""

    def __init__(self) -> None:
        super().__init__()
        self._lines: queue.Queue[logging.LogRecord | None] = queue.Queue(_QUEUED_LINES)
        self._dropped = 0
        self._closing = threading.Event()
        self._to_journal = "JOURNAL_STREAM" in os.environ
        self._thread = threading.Thread(target=self._write_all, name="journal", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        """Queue a record, or count it as dropped. Never blocks."""
        try:
            self._lines.put_nowait(record)
        except queue.Full:
            self._dropped += 1

    def close(self) -> None:
        """Give the thread a moment to write what is queued."""
        self._closing.set()
        try:
            self._lines.put_nowait(None)
        except queue.Full:
            pass
        else:
            self._thread.join(_FLUSH_S)
        super().close()

    def _write_all(self) -> None:
        while (record := self._next()) is not None:
            dropped, self._dropped = self._dropped, 0
            text = self.format(record) + (f" ({dropped} earlier lines were dropped)" if dropped else "")
            # Names from the wire may hold what is no UTF-8.
            text = text.encode(errors="backslashreplace").decode()
            with contextlib.suppress(OSError):  # there is nobody to tell, and the next line may get through
                self._write(record, text)

    def _next(self) -> logging.LogRecord | None:
        with contextlib.suppress(queue.Empty):
            return self._lines.get_nowait()
        record = self._lines.get()
        self._closing.wait(_REST_S)
        return record

    def _write(self, record: logging.LogRecord, text: str) -> None:
        if not self._to_journal:
            sys.stderr.write(f"{record.levelname.lower()}: {text}\n")
            return
        fields = {
            "MESSAGE": text,
            "PRIORITY": _PRIORITIES.get(record.levelno, 6),
            "SYSLOG_IDENTIFIER": "ballastd",
            "CODE_MODULE": record.name,
            "CODE_LINE": record.lineno,
        }
        journal.send(fields | _own_fields(record))


def _own_fields(record: logging.LogRecord) -> dict[str, str]:
    """What a caller passed as ``extra``, as BALLAST_PEER, BALLAST_COMMAND and so on."""
    own = {name: value for name, value in vars(record).items() if name.isupper()}
    return {f"BALLAST_{name}": str(value).encode(errors="backslashreplace").decode() for name, value in own.items()}


def passed_sockets() -> dict[int, socket.socket]:
    """Listening sockets from systemd, by address family (sd_listen_fds(3))."""
    sockets = [socket.socket(fileno=fd) for fd in listen_fds()]
    return {sock.family: sock for sock in sockets}


def read_credential(name: str) -> bytes | None:
    """A credential that the unit loads (``LoadCredential=``), without white space around it; None without one."""
    folder = os.environ.get("CREDENTIALS_DIRECTORY")
    try:
        return (Path(folder) / name).read_bytes().strip() or None if folder else None
    except OSError:
        return None


async def feed_watchdog() -> None:
    """Tell systemd that the event loop runs, twice in each of its periods; for ever, or not at all without one."""
    period_s = watchdog_s()
    while period_s is not None:
        notify("WATCHDOG=1")
        await asyncio.sleep(period_s / 2)
