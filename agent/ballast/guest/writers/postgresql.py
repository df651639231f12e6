"""PostgreSQL: a checkpoint before the freeze, and the WAL position that the snapshot reaches at least.

Nothing is held: what is in the snapshot is what a crash would leave, and recovery from the last checkpoint is what
PostgreSQL does with that ("Backup and Restore", 25.2: a consistent snapshot with the WAL in it needs no more). The
session that saw the checkpoint is kept until the thaw: if it answers, the server ran all the while.
"""

from __future__ import annotations

import socket
from pathlib import Path

from ballast.guest.writers.client import Client
from ballast.guest.writers.program import AbsentError, Writer, WriterError, run

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from ballast.guest.writers.program import Request

# Each cluster that runs has one. Not also /tmp, where anybody could put one.
SOCKETS = ["/run/postgresql/.s.PGSQL.*"]
# /usr/bin/psql of Debian is a script around these, and slow to start.
PROGRAMS = "usr/lib/postgresql/*/bin/psql"

# Before version 14 nothing ends an idle session.
STAY = "SELECT set_config(name, '0', false) FROM pg_settings WHERE name = 'idle_session_timeout';"
POSITION = """\
SELECT current_setting('server_version'), system_identifier, timeline_id, pg_is_in_recovery(),
    CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn() ELSE pg_current_wal_flush_lsn() END
FROM pg_control_system(), pg_control_checkpoint();"""


class PostgreSQL(Writer):
    """All clusters that run in this guest."""

    def __init__(self) -> None:
        self._sessions: dict[str, Client] = {}  # by the cluster's socket

    def identify(self, request: Request) -> dict[str, Any]:
        """Absent if nobody listens. As root and as postgres: neither connects yet."""
        if not find_clusters(request):
            raise AbsentError("no cluster is running")
        return {"user": "postgres", "prepare-ms": 60_000}

    def prepare(self, request: Request) -> dict[str, Any]:
        """Write a checkpoint in each cluster, so that what recovery has to do is little."""
        self._close()  # of an attempt before
        clusters = find_clusters(request)
        if not clusters:
            raise WriterError("no cluster is running any more")
        for cluster in clusters:
            self._sessions[cluster] = Client(psql(cluster, request), "\\echo {}", {"PGAPPNAME": "ballast"})
            self._ask(cluster, request, f"{STAY}\nCHECKPOINT;")
        return {}

    def freeze(self, request: Request) -> dict[str, Any]:
        """Note how far the WAL is on disk."""
        return {"detail": {"clusters": [self._position(cluster, request) for cluster in self._sessions]}}

    def thaw(self, request: Request) -> dict[str, Any]:
        """It held if every session outlived the freeze."""
        try:
            for cluster in self._sessions:
                self._ask(cluster, request, "SELECT 1;")
        except WriterError as error:
            return {"held": False, "reason": str(error)}
        finally:
            self._close()
        return {"held": True}

    def abort(self, request: Request) -> dict[str, Any]:
        """End the sessions; there is nothing else to undo."""
        self._close()
        return {}

    def _position(self, cluster: str, request: Request) -> dict[str, Any]:
        row = self._ask(cluster, request, POSITION)[-1]
        version, system, timeline, in_recovery, lsn = row.split("|")
        return {
            "socket": cluster,
            "version": version,
            "system-identifier": system,
            "timeline": int(timeline),
            "wal-lsn": lsn,
            "standby": in_recovery == "t",
        }

    def _ask(self, cluster: str, request: Request, statements: str) -> list[str]:
        try:
            return self._sessions[cluster].ask(request, statements)
        except WriterError as error:
            raise WriterError(f"{cluster}: {error}", retryable="starting up" in str(error)) from error

    def _close(self) -> None:
        while self._sessions:
            self._sessions.popitem()[1].close()


def find_clusters(request: Request) -> list[str]:
    """The sockets on which somebody listens; a server that was killed leaves its own behind."""
    patterns = request.config.get("sockets", SOCKETS)
    paths = {str(path) for pattern in patterns for path in Path("/").glob(pattern.lstrip("/"))}
    return [path for path in sorted(paths) if not path.endswith(".lock") and _is_heard(path, request)]


def _is_heard(path: str, request: Request) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(request.left_s())
        try:
            probe.connect(path)
        except TimeoutError:  # somebody has it and does not come: no reason to leave the cluster out
            return True
        except OSError:
            return False
    return True


def psql(cluster: str, request: Request) -> list[str]:
    """The command of a session with a cluster, by its socket ``FOLDER/.s.PGSQL.PORT``. It reads no file of the user."""
    folder, _, port = cluster.rpartition("/.s.PGSQL.")
    program = max(Path("/").glob(PROGRAMS), key=_version, default="psql")
    options = ["--no-psqlrc", "--no-password", "--quiet", "--no-align", "--tuples-only", "--set=ON_ERROR_STOP=1"]
    database = str(request.config.get("database", "postgres"))
    return [str(program), *options, f"--host={folder}", f"--port={port}", f"--dbname={database}"]


def _version(program: Path) -> float:
    name = program.parts[-3]
    return float(name) if name.replace(".", "", 1).isdigit() else 0.0


def main() -> int:
    """The program."""
    return run(PostgreSQL())
