"""Runs inside a fresh guest: what is in one snapshot of the disks of a guest in which crash_load.py ran.

    python3 -m tests.vm.crash_check {"<SCSI target>": {"name": "data0", "type": "ext4", "servers": ["postgresql"]}, ...}

The disks are throw-away copies. For each: the file system's checker as it is; mounted once (which replays the journal)
and unmounted, then the checker again; mounted again, its servers started on what they find, and asked. Prints a JSON
object, by disk: {"before", "after": exit status of the checker, "said": what it said the second time, "deleted":
whether the deleted file still shows, "last": {writer: its last write}, "torn": [writers with gaps before that],
"failed": why it could not go on, if it could not}.
"""

from __future__ import annotations

import json
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.vm.crash_load import DELETED, FILE, RECORD_BYTES, SERVERS, SLOTS

CHECKS = {"ext4": ["e2fsck", "-fn"], "xfs": ["xfs_repair", "-n"], "btrfs": ["btrfs", "check", "--readonly"]}
TIMEOUT_S = 120
PERIOD_S = 0.1
QUERY = (
    "SELECT t.client, t.n, count(e.n), coalesce(max(e.n), 0) "
    "FROM total t LEFT JOIN entry e ON e.client = t.client GROUP BY t.client, t.n;\n"
)


def run(*argv: str) -> subprocess.CompletedProcess[str]:
    """Run a program to its end, whatever that is."""
    return subprocess.run(argv, check=False, capture_output=True, text=True, timeout=TIMEOUT_S)


def find_device(target: str) -> str:
    """The disk with that SCSI target, which may still be coming."""
    deadline_s = time.monotonic() + TIMEOUT_S
    while not (found := list(Path("/sys/bus/scsi/devices").glob(f"*:0:{target}:0/block/*"))):
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"no disk with the SCSI target {target}")
        time.sleep(PERIOD_S)
    return f"/dev/{found[0].name}"


@contextmanager
def mounted(device: str, type_: str, folder: Path) -> Iterator[Path]:
    """For this time."""
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", type_, device, str(folder)], check=True, capture_output=True, timeout=TIMEOUT_S)
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True, capture_output=True, timeout=TIMEOUT_S)


def read_file(folder: Path) -> tuple[int, bool]:
    """The number of the last write of crash_load's to its file, and whether all is there that it wrote before that."""
    if not (folder / FILE).exists():
        return -1, False
    data = (folder / FILE).read_bytes()
    records = [data[offset : offset + RECORD_BYTES] for offset in range(0, len(data), RECORD_BYTES)]
    numbers = [struct.unpack("<Q", record[:8].ljust(8))[0] for record in records]
    last = max(numbers, default=-1)
    expected = {number % SLOTS: number for number in range(max(0, last - SLOTS + 1), last + 1)}
    whole = {slot: struct.pack("<Q", number) * (RECORD_BYTES // 8) for slot, number in expected.items()}
    return last, dict(enumerate(records)) == whole


@contextmanager
def served(server: str, folder: Path) -> Iterator[None]:
    """A server on that folder, killed at the end. RuntimeError if it does not answer."""
    log = Path(f"/run/lab-{server}.log")
    with log.open("wb") as output:
        child = subprocess.Popen(command(server, folder), stdin=subprocess.DEVNULL, stdout=output, stderr=output)
    try:
        deadline_s = time.monotonic() + TIMEOUT_S
        while subprocess.run(SERVERS[server][0](), input=b"", capture_output=True, timeout=TIMEOUT_S).returncode:
            if child.poll() is not None or time.monotonic() > deadline_s:
                raise RuntimeError(f"{server} does not start: {log.read_text(errors='replace')[-3000:]}")
            time.sleep(PERIOD_S)
        yield
    finally:
        # Of PostgreSQL all processes end with the first one on SIGQUIT (an "immediate shutdown").
        child.send_signal(signal.SIGQUIT if server == "postgresql" else signal.SIGKILL)
        child.wait(TIMEOUT_S)


def command(server: str, folder: Path) -> list[str]:
    """Start a server in the foreground, on data in the folder, with Debian's configuration."""
    if server == "mariadb":
        runtime = Path("/run/mysqld")
        runtime.mkdir(exist_ok=True)
        shutil.chown(runtime, "mysql", "mysql")
        options = ["--user=mysql", f"--tmpdir={runtime}", "--skip-networking"]
        return ["mariadbd", *options, f"--datadir={folder / server}"]
    configuration = next(Path("/etc/postgresql").glob("*/main/postgresql.conf"))
    version = configuration.parts[3]
    return [
        *("setpriv", "--reuid=postgres", "--regid=postgres", "--init-groups", "--"),
        *(f"/usr/lib/postgresql/{version}/bin/postgres", f"--config_file={configuration}", "-cssl=off"),
        f"--data_directory={folder / server / version / 'main'}",
    ]


def read_rows(server: str, folder: Path) -> Iterator[tuple[str, int, bool]]:
    """Of each of its clients: name, last transaction, and whether all before that are there."""
    with served(server, folder):
        asked = subprocess.run(
            SERVERS[server][0](), input=QUERY, check=True, capture_output=True, text=True, timeout=TIMEOUT_S
        )
    for line in asked.stdout.splitlines():
        client, total, count, last = map(int, line.split("\t"))
        yield f"{server}-{client}", last, total == count == last


def inspect(target: str, name: str, type_: str, servers: list[str]) -> dict[str, Any]:
    """Look at one disk; what goes wrong in that is a result as well."""
    result: dict[str, Any] = {"before": 0, "after": 0, "said": "", "deleted": False, "last": {}, "torn": []}
    try:
        for writer, last, is_whole in look(find_device(target), name, type_, servers, result):
            result["last"][writer] = last
            result["torn"] += [] if is_whole else [writer]
    except (OSError, RuntimeError, ValueError, subprocess.SubprocessError) as error:
        result["failed"] = f"{error!r}{getattr(error, 'stderr', None) or ''}"
    return result


def look(
    device: str, name: str, type_: str, servers: list[str], result: dict[str, Any]
) -> Iterator[tuple[str, int, bool]]:
    """Check, mount and unmount, check again; then yield of each writer what is there. The rest goes to the result."""
    folder = Path("/mnt", name)
    result["before"] = run(*CHECKS[type_], device).returncode
    with mounted(device, type_, folder):
        pass
    after = run(*CHECKS[type_], device)
    result["after"] = after.returncode
    if after.returncode:
        result["said"] = f"{after.stdout}{after.stderr}"[-2000:]
    with mounted(device, type_, folder):
        result["deleted"] = (folder / DELETED).exists()
        yield f"file-{name}", *read_file(folder)
        for server in servers:
            yield from read_rows(server, folder)
    if type_ == "btrfs":
        run("btrfs", "device", "scan", "--forget", device)  # the next snapshot has the same identity


def main() -> None:
    """All disks at once: they wait for one another's programs, but less than one after the other."""
    disks = json.loads(sys.argv[1])
    with ThreadPoolExecutor(len(disks)) as threads:
        results = {
            disk["name"]: threads.submit(inspect, target, disk["name"], disk["type"], disk["servers"])
            for target, disk in disks.items()
        }
    sys.stdout.write(json.dumps({name: result.result() for name, result in results.items()}) + "\n")


if __name__ == "__main__":
    main()
