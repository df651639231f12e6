"""Runs inside a guest whose snapshots are checked: writes without end, of which each that is done is told to the host.

    python3 -m tests.vm.crash_load PORT MOUNTPOINT...

Whoever has done a write sends "<writer> <number>\n" to PORT, a virtio-serial port, and only then begins the next one:
- for each mount point a writer of a file, without any sync: write number n goes to slot n % SLOTS of FILE. It also
  holds a deleted file open;
- CLIENTS sessions with each server, a transaction each time, whose row and counter a snapshot has both or none of.
"""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

FILE, DELETED = ".lab-crash", ".lab-crash-deleted"
SLOTS, RECORD_BYTES = 64, 16 << 10
PAUSE_S = 0.01  # what a file's writer leaves to the others
CLIENTS = 2
MARK = "lab-done"

Tell = Callable[[str, int], None]


def psql() -> list[str]:
    """A session with PostgreSQL, as its superuser. Debian's own psql is a script around this, and slow."""
    program = next(Path("/usr/lib/postgresql").glob("*/bin/psql"))
    as_postgres = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups", "--"]
    return [*as_postgres, str(program), "-XqAt", "-F", "\t", "-v", "ON_ERROR_STOP=1", "-d", "postgres"]


def mariadb() -> list[str]:
    """A session with MariaDB, as root of both."""
    return ["mariadb", "--no-defaults", "-BN", "--unbuffered", "--skip-reconnect", "lab"]


# By server: the command of a session, and the statement that makes it say MARK.
SERVERS = {"postgresql": (psql, f"\\echo {MARK}"), "mariadb": (mariadb, f"SELECT '{MARK}';")}


def write_file(tell: Tell, mountpoint: str) -> None:
    """Buffered writes, one after the other."""
    deleted = os.open(Path(mountpoint, DELETED), os.O_WRONLY | os.O_CREAT, 0o600)
    os.write(deleted, bytes(RECORD_BYTES))
    Path(mountpoint, DELETED).unlink()
    file = os.open(Path(mountpoint, FILE), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    name = f"file-{Path(mountpoint).name}"
    number = 0
    while True:
        os.pwrite(file, struct.pack("<Q", number) * (RECORD_BYTES // 8), number % SLOTS * RECORD_BYTES)
        tell(name, number)
        number += 1
        time.sleep(PAUSE_S)


def write_rows(tell: Tell, server: str, client: int) -> None:
    """Transactions in one session, one after the other. RuntimeError when it ends."""
    command, mark = SERVERS[server]
    child = subprocess.Popen(command(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert child.stdin
    assert child.stdout
    number = 1
    while True:
        child.stdin.write(
            f"BEGIN; INSERT INTO entry VALUES ({client}, {number}); "
            f"UPDATE total SET n = {number} WHERE client = {client}; COMMIT;\n{mark}\n".encode()
        )
        child.stdin.flush()
        if (said := child.stdout.readline().decode(errors="replace")) != f"{MARK}\n":
            raise RuntimeError(f"{server}: {said}")
        tell(f"{server}-{client}", number)
        number += 1


def main() -> None:
    """Ends only when a writer fails: then all end, and the host hears no more."""
    port_path, *mountpoints = sys.argv[1:]
    port = os.open(port_path, os.O_WRONLY)
    telling = threading.Lock()

    def tell(name: str, number: int) -> None:
        with telling:
            os.write(port, f"{name} {number}\n".encode())

    def run(writer: Callable[..., None], *arguments: object) -> None:
        try:
            writer(tell, *arguments)
        except BaseException as error:  # noqa: BLE001 - whatever it is, it ends them all
            sys.stderr.write(f"{arguments}: {error!r}\n")
            os._exit(1)

    work = [(write_file, mountpoint) for mountpoint in mountpoints]
    rows = [(write_rows, server, client) for server in SERVERS for client in range(CLIENTS)]
    threads = [threading.Thread(target=run, args=one) for one in (*work, *rows)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    main()
