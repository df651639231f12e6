"""Redis and Valkey: a save that began after the freeze was asked for, and complete before anything is frozen.

What the server has accepted since is in its append-only file, if it has one: writing goes on until the file system is
frozen, and what the server has written by then is in the snapshot. So nothing is held. That the server was the same
all the while its ``run_id`` shows, which each start makes anew (https://redis.io/docs/latest/commands/info/).
"""

from __future__ import annotations

import shlex
import time
from pathlib import Path

from ballast.guest.writers.program import AbsentError, Writer, WriterError, run
from ballast.guest.writers.resp import Connection, ServerError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from ballast.guest.writers.program import Request

# Not the ones of Sentinel, which holds no data.
CONFIG_FILES = ["/etc/redis/redis*.conf", "/etc/valkey/valkey*.conf", "/etc/redis.conf", "/etc/valkey.conf"]
# The server tells nobody when a save has ended.
POLL_S = 0.1


class Server:
    """A server as its configuration file describes it: how it is reached, and with what password."""

    def __init__(self, file: Path) -> None:
        """OSError, ValueError."""
        directives = read_directives(file)
        self._password = directives.get("requirepass", [""])[0]
        self.address = address(directives)
        self._connection: Connection | None = None
        self.run_id = ""

    def connect(self, request: Request) -> None:
        """Connect, and log in if there is a password. OSError if nobody listens, WriterError."""
        self._connection = Connection(self.address, request)
        if self._password:
            self.command(request, "AUTH", self._password)

    def find_again(self, request: Request) -> dict[str, str]:
        """Connect, and see that it is the same server; what its INFO says. WriterError."""
        try:
            self.connect(request)
        except OSError as error:
            raise WriterError(f"{self.name}: {error}") from error
        return self.info(request)

    def command(self, request: Request, *words: str) -> Any:
        """The answer to a command. ServerError if the server says no, WriterError if it is not there."""
        if self._connection is None:
            raise WriterError(f"{self.name}: there is no connection")
        try:
            return self._connection.command(request, *words)
        except ServerError as error:
            raise ServerError(f"{self.name}: {error}") from error
        except TimeoutError as error:
            raise WriterError(f"{self.name}: the server did not answer {request.verb} in time") from error
        except OSError as error:
            raise WriterError(f"{self.name}: the connection was lost: {error}") from error

    @property
    def name(self) -> str:
        """Its address, for people."""
        return self.address if isinstance(self.address, str) else "{}:{}".format(*self.address)

    def info(self, request: Request) -> dict[str, str]:
        """What INFO says of the server and of what it saves. A server that is another one by now is a WriterError."""
        lines = "\n".join(self.command(request, "INFO", section) for section in ("server", "persistence")).splitlines()
        info = dict(line.split(":", 1) for line in lines if ":" in line)
        self.run_id = self.run_id or info["run_id"]
        if info["run_id"] != self.run_id:
            raise WriterError(f"{self.name}: the server was restarted")
        return info

    def saves_nothing(self, request: Request) -> bool:
        """Whether it is configured to keep nothing: then a save would bring old data back at its next start."""
        is_appending = self.info(request)["aof_enabled"] == "1"
        try:
            configured = self.command(request, "CONFIG", "GET", "save")
        except ServerError:  # the command may be renamed
            return False
        return configured == ["save", ""] and not is_appending

    def close(self) -> None:
        """Disconnect."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None


class Redis(Writer):
    """All servers that are configured on this machine and running."""

    def __init__(self) -> None:
        self._servers: list[Server] = []

    def identify(self, request: Request) -> dict[str, Any]:
        """Find out which are running."""
        self._servers, why = find_servers(request)
        if not self._servers:
            raise AbsentError("; ".join(why) or "no server is configured")
        return {"prepare-ms": 60_000}

    def prepare(self, request: Request) -> dict[str, Any]:
        """Have every server save, all at once, and wait for it."""
        try:
            for server in self._servers:
                server.find_again(request)
                start_save(server, request)
            for server in self._servers:
                if wait_for_save(server, request)["rdb_last_bgsave_status"] != "ok":
                    raise WriterError(f"{server.name}: the save failed, see the server's log")
        finally:
            self._disconnect()
        return {}

    def freeze(self, request: Request) -> dict[str, Any]:
        """See that it is still the same server, and note what is saved."""
        try:
            return {"detail": {"servers": [describe(server, request) for server in self._servers]}}
        finally:
            self._disconnect()

    def thaw(self, request: Request) -> dict[str, Any]:
        """It held if every server ran all the while."""
        try:
            for server in self._servers:
                server.find_again(request)
        except WriterError as error:
            return {"held": False, "reason": str(error)}
        finally:
            self._disconnect()
        return {"held": True}

    def _disconnect(self) -> None:
        """A connection is for one request: who is idle may be dropped, and the next one is to find out who is there."""
        for server in self._servers:
            server.close()


def find_servers(request: Request) -> tuple[list[Server], list[str]]:
    """Those that run, each once, and why the others are left out. OSError, ValueError, WriterError."""
    found: dict[str, Server | None] = {}  # None: there is nothing to do for it
    refused: dict[str, ServerError] = {}
    left_out = []
    patterns = request.config.get("config-files", CONFIG_FILES)
    for file in sorted({file for pattern in patterns for file in Path("/").glob(pattern.lstrip("/"))}):
        server = Server(file)
        try:
            server.connect(request)
            found[server.name] = None if server.saves_nothing(request) else server
        except (ConnectionRefusedError, FileNotFoundError):
            left_out.append(f"no server of {file} is running")
        except ServerError as error:
            refused[server.name] = error
        finally:
            server.close()
    # The files of Redis and of Valkey name the same port, where only one can be; which one, the password may tell.
    for name in refused.keys() - found.keys():
        raise refused[name]
    left_out += [f"{name} is configured to save nothing" for name, server in found.items() if server is None]
    return [server for server in found.values() if server is not None], left_out


def start_save(server: Server, request: Request) -> None:
    """Have a save begin, after one that had begun before if need be. WriterError."""
    while True:
        try:
            server.command(request, "BGSAVE")
        except ServerError as error:
            # "Background save already in progress", "Another child process is active (AOF?)"
            if not ("in progress" in str(error) or "is active" in str(error)) or request.left_s() <= POLL_S:
                raise
            time.sleep(POLL_S)
        else:
            return


def wait_for_save(server: Server, request: Request) -> dict[str, str]:
    """What the server says of it once it is complete. WriterError if it is not in time."""
    while (info := server.info(request))["rdb_bgsave_in_progress"] != "0":
        if request.left_s() <= POLL_S:
            raise WriterError(f"{server.name}: the save takes longer than the {request.verb} may")
        time.sleep(POLL_S)
    return info


def describe(server: Server, request: Request) -> dict[str, Any]:
    """What is in the snapshot of one server."""
    info = server.find_again(request)
    return {
        "address": server.name,
        "run-id": info["run_id"],
        "saved-at-s": int(info["rdb_last_save_time"]),
        "changes-since": int(info["rdb_changes_since_last_save"]),
        "append-only": info["aof_enabled"] == "1",
    }


def read_directives(file: Path) -> dict[str, list[str]]:
    """``redis.conf``: a directive a line, the last one counts. OSError, ValueError."""
    lines = [line.strip() for line in file.read_text().splitlines()]
    words = [shlex.split(line) for line in lines if line and not line.startswith("#")]
    return {word[0].lower(): word[1:] for word in words if len(word) > 1}


def address(directives: dict[str, list[str]]) -> str | tuple[str, int]:
    """Where a server with these directives listens: its socket, else loopback, else what it is bound to."""
    if "unixsocket" in directives:
        return directives["unixsocket"][0]
    hosts = [host.lstrip("-") for host in directives.get("bind", ["*"])]
    is_on_loopback = not {"*", "0.0.0.0", "127.0.0.1"}.isdisjoint(hosts)
    return ("127.0.0.1" if is_on_loopback else hosts[0], int(directives.get("port", ["6379"])[0]))


def main() -> int:
    """The program."""
    return run(Redis())
