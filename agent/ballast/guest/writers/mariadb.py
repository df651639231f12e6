"""MariaDB: BACKUP STAGE, held by one session from before the freeze to after the thaw.

https://mariadb.com/kb/en/backup-stage/ (10.4.1 and later): START and FLUSH close idle tables of the engines that
recover nothing by themselves, BLOCK_DDL and BLOCK_COMMIT let running statements and commits end and hold new ones
back, END lets go. All of it is the session's: it goes when the client ends or the server does.
"""

from __future__ import annotations

import contextlib
import re

from ballast.guest.writers.client import Client
from ballast.guest.writers.program import AbsentError, Writer, WriterError, run

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from ballast.guest.writers.program import Request

# --skip-reconnect: a session that came back by itself would have no locks. The first errno's are: no socket, no server.
OPTIONS = [
    "--batch",
    "--skip-column-names",
    "--unbuffered",
    "--skip-reconnect",
    "--no-auto-rehash",
    "--protocol=socket",
]
NOBODY_THERE = re.compile(r"ERROR 2002 .*\((2|111)\)")
DAY_S = 86_400


class MariaDB(Writer):
    """The server that the client program finds, as root of both."""

    def __init__(self) -> None:
        self._session: Client | None = None

    def identify(self, request: Request) -> dict[str, Any]:
        """Begin the session that all else is said in."""
        self._session = Client(mariadb(request), "SELECT '{}';")
        try:
            version = self._ask(request, "SELECT VERSION();")[-1]
        except WriterError as error:
            if NOBODY_THERE.search(str(error)):
                raise AbsentError("no server is running") from error
            raise
        if "MariaDB" not in version:
            raise AbsentError(f"MySQL {version} has no BACKUP STAGE")
        return {}

    def prepare(self, request: Request) -> dict[str, Any]:
        """Flush tables that nobody uses. Holds only other backups back."""
        self._ask(request, f"SET SESSION wait_timeout = {DAY_S};")
        for stage in ("START", "FLUSH"):
            self._ask(request, f"{deadline(request)}BACKUP STAGE {stage};")
        return {}

    def freeze(self, request: Request) -> dict[str, Any]:
        """Hold commits and changes of tables back, and note where replication stands."""
        for stage in ("BLOCK_DDL", "BLOCK_COMMIT"):
            self._ask(request, f"{deadline(request)}BACKUP STAGE {stage};")
        status = self._ask(request, "SHOW MASTER STATUS;")
        (gtid,) = self._ask(request, "SELECT @@GLOBAL.gtid_current_pos;")
        detail: dict[str, Any] = {"gtid": gtid} if gtid else {}
        if status:  # empty without a binary log
            file, position = status[0].split("\t")[:2]
            detail |= {"binlog-file": file, "binlog-position": int(position)}
        return {"detail": detail}

    def thaw(self, request: Request) -> dict[str, Any]:
        """Let commits go on. It held if the session that held them is still there to do so."""
        try:
            self._ask(request, "BACKUP STAGE END;")
        except WriterError as error:
            return {"held": False, "reason": str(error)}
        finally:
            self._close()
        return {"held": True}

    def abort(self, request: Request) -> dict[str, Any]:
        """As thaw; if the session cannot say END any more, the server does when it sees it gone."""
        with contextlib.suppress(WriterError):
            self._ask(request, "BACKUP STAGE END;")
        self._close()
        return {}

    def _ask(self, request: Request, statements: str) -> list[str]:
        if self._session is None:
            raise WriterError("there is no session")
        try:
            return self._session.ask(request, statements)
        except WriterError as error:
            self._session = None
            raise WriterError(str(error).rpartition("--- ")[2]) from error  # first it repeats what it was told

    def _close(self) -> None:
        if self._session is not None:
            self._session.close()
            self._session = None


def deadline(request: Request) -> str:
    """The statement that has later ones wait for a lock no longer than the agent waits for us."""
    return f"SET SESSION lock_wait_timeout = {int(request.left_s())};"


def mariadb(request: Request) -> list[str]:
    """The command of a session. Which server, and how to log in to it, its own option files say."""
    command = ["mariadb"]
    if "defaults-file" in request.config:  # it counts only as the first
        command.append(f"--defaults-file={request.config['defaults-file']}")
    command += OPTIONS
    if "socket" in request.config:
        command.append(f"--socket={request.config['socket']}")
    return command


def main() -> int:
    """The program."""
    return run(MariaDB())
