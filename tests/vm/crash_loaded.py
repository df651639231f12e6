"""The guest of the crash-consistency campaign that is loaded and snapshotted: what it runs, and what it has told us.

Each snapshot is an external one, taken while all is frozen: the images that the guest had until then are the snapshot,
and it goes on in overlays, which are merged into the first images again when the snapshots have been looked at.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ballast.host.agent import Agent
from ballast.wire.names import QuiesceBegun, QuiesceEnded
from tests.lab.guest import Guest
from tests.vm.crash_load import CLIENTS, SERVERS

IN_GUEST = "/run/lab-crash"
PORT = "lab.acks.0"
UNIT = "lab-crash-load"
LEASE_MS = 60_000
PROGRESS_TIMEOUT_S = 120
# Killed, since a clean end takes long and is of no use to anybody.
STOP = f"""
systemctl stop {UNIT} 2>/dev/null || true
systemctl kill --signal=KILL postgresql@17-main mariadb 2>/dev/null || true
systemctl stop postgresql@17-main mariadb
systemctl reset-failed postgresql@17-main mariadb 2>/dev/null || true
for folder in postgresql mysql; do
    while mountpoint -q /var/lib/$folder; do umount /var/lib/$folder || sleep 0.1; done
done
rm -rf /mnt/data*/postgresql /mnt/data*/mariadb /mnt/data*/.lab-crash
"""
START = """
cp -a /var/lib/postgresql {postgresql}/postgresql
cp -a /var/lib/mysql {mariadb}/mariadb
mount --bind {postgresql}/postgresql /var/lib/postgresql
mount --bind {mariadb}/mariadb /var/lib/mysql
systemctl start postgresql@17-main mariadb
until runuser -u postgres -- psql -Xqc '' postgres; do sleep 0.2; done 2>/dev/null
until mariadb -e ''; do sleep 0.2; done 2>/dev/null
"""
TABLES = f"""
CREATE TABLE entry (client int, n int, PRIMARY KEY (client, n));
CREATE TABLE total (client int PRIMARY KEY, n int);
INSERT INTO total VALUES {", ".join(f"({client}, 0)" for client in range(CLIENTS))};
"""
# Commits that do not wait for the disk: what they acknowledged is lost, and must be missed.
HASTY = {
    "postgresql": "ALTER SYSTEM SET synchronous_commit = off;\nSELECT pg_reload_conf();\n",
    "mariadb": "SET GLOBAL innodb_flush_log_at_trx_commit = 0;\n",
}

Acknowledged = dict[str, int]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What a guest's disks were at one moment: by disk, its image and that image's format."""

    images: Mapping[str, tuple[Path, str]]
    acknowledged: Acknowledged  # what we had heard of before it was taken
    began: QuiesceBegun | None = None
    ended: QuiesceEnded | None = None


class Acknowledgements(threading.Thread):
    """Hears, outside the guest, which write of each writer was the last that is done."""

    def __init__(self, path: Path) -> None:
        super().__init__(name="acknowledgements", daemon=True)
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(str(path))
        self._heard = threading.Condition()
        self._last: Acknowledged = {}
        self._total = 0

    def run(self) -> None:
        """Listen until the guest's end is closed."""
        with self._socket, self._socket.makefile("r", encoding="ascii") as lines:
            for line in lines:
                name, _, number = line.partition(" ")
                with self._heard:
                    self._last[name] = int(number)
                    self._total += 1
                    self._heard.notify_all()

    def forget(self) -> None:
        """The writers that were heard are gone."""
        with self._heard:
            self._last.clear()

    def close(self) -> None:
        """Hear no more."""
        with contextlib.suppress(OSError):  # the guest's end is closed
            self._socket.shutdown(socket.SHUT_RDWR)
        self.join()

    @property
    def last(self) -> Acknowledged:
        """By writer, its last write of which we heard."""
        with self._heard:
            return dict(self._last)

    def wait_progress(self, names: set[str]) -> None:
        """Return when each of them has been heard of once more. Raises TimeoutError."""
        before = self.last
        deadline_s = time.monotonic() + PROGRESS_TIMEOUT_S
        with self._heard:
            while stuck := {name for name in names if self._last.get(name, -1) <= before.get(name, -1)}:
                if not self._heard.wait(deadline_s - time.monotonic()):
                    raise TimeoutError(f"nothing more is heard of {', '.join(sorted(stuck))}")


class Loaded:
    """A running guest with data disks and the agent, in which writers write. Use loaded()."""

    def __init__(self, guest: Guest, acks: Acknowledgements) -> None:
        self.guest = guest
        self.servers: dict[str, list[str]] = {}
        self._acks = acks
        self._tops = {disk.name: (disk.name, disk.path, "raw") for disk in guest.disks}
        self._overlays: list[Path] = []

    def begin(self, layout: Mapping[str, int], *, is_hasty: bool = False) -> None:
        """Start the servers anew, each with its data on the disk with that number, and all writers."""
        guest = self.guest
        self.stop()
        self._acks.forget()
        self.servers = {disk.name: [] for disk in guest.disks}
        for server, index in layout.items():
            self.servers[guest.disks[index].name].append(server)
        folders = {server: guest.disks[index].mountpoint for server, index in layout.items()}
        guest.run(START.format(**folders), timeout_s=240)
        first = HASTY if is_hasty else dict.fromkeys(HASTY, "")
        as_postgres = ["runuser", "-u", "postgres", "--", "psql", "-Xq", "-v", "ON_ERROR_STOP=1", "postgres"]
        guest.run(as_postgres, stdin=f"{first['postgresql']}{TABLES}".encode(), timeout_s=60)
        database = "CREATE OR REPLACE DATABASE lab; USE lab;"
        guest.run(["mariadb"], stdin=f"{first['mariadb']}{database}{TABLES}".encode(), timeout_s=60)
        self._start_writers()

    def _start_writers(self) -> None:
        mountpoints = " ".join(disk.mountpoint for disk in self.guest.disks)
        folder = f"{IN_GUEST}/tests/vm"
        self.guest.put(f"{folder}/crash_load.py", Path(__file__).with_name("crash_load.py").read_bytes())
        self.guest.run(
            f"systemd-run --quiet --collect --unit={UNIT} --working-directory={IN_GUEST} "
            f"/usr/bin/python3 -B -m tests.vm.crash_load /dev/virtio-ports/{PORT} {mountpoints}"
        )
        self.wait_progress()

    @property
    def acknowledged(self) -> Acknowledged:
        """What we have heard of so far, by writer."""
        return self._acks.last

    def stop(self) -> None:
        """End writers and servers, and remove what they wrote; what was on root is there again."""
        self.guest.run(STOP, timeout_s=120)

    def wait_progress(self) -> None:
        """Return when every writer has done one write more. Raises TimeoutError, with what the writers said."""
        names = {f"file-{disk.name}" for disk in self.guest.disks}
        names |= {f"{server}-{client}" for server in SERVERS for client in range(CLIENTS)}
        try:
            self._acks.wait_progress(names)
        except TimeoutError as error:
            said = self.guest.run(f"journalctl -u {UNIT} -n 20 --no-pager -o cat", check=False).stdout
            raise TimeoutError(f"{error}: {said}") from error

    async def snapshot(self, token: str) -> Snapshot:
        """Freeze, snapshot, thaw."""
        session_id = str(uuid.uuid4())
        async with Agent.connect(f"unix:{self.guest.vsock_path}?connect=640", token=token) as agent:
            began = await agent.quiesce_begin(session_id, LEASE_MS)
            try:
                taken = await asyncio.to_thread(self.cut)
            finally:
                ended = await agent.quiesce_end(session_id)
        return Snapshot(taken.images, taken.acknowledged, began, ended)

    def cut(self) -> Snapshot:
        """Take a snapshot, whether anything is frozen or not."""
        number = len(self._overlays) // len(self._tops)
        overlays = {name: self.guest.dir / f"{name}-{number}.qcow2" for name in self._tops}
        actions = [
            {
                "type": "blockdev-snapshot-sync",
                "data": {
                    "node-name": node,
                    "snapshot-file": str(overlays[name]),
                    "snapshot-node-name": f"{name}-{number}",
                    "format": "qcow2",
                },
            }
            for name, (node, _, _) in self._tops.items()
        ]
        acknowledged = self.acknowledged
        self.guest.qmp("transaction", actions=actions)
        images = {name: (path, format_) for name, (_, path, format_) in self._tops.items()}
        self._tops = {name: (f"{name}-{number}", overlays[name], "qcow2") for name in self._tops}
        self._overlays += overlays.values()
        return Snapshot(images, acknowledged)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The guest stands still, for the sake of another one."""
        self.guest.qmp("stop")
        try:
            yield
        finally:
            self.guest.qmp("cont")

    def merge(self) -> None:
        """Bring what came after the first snapshot back into the first images. All snapshots are void then."""
        for disk in self.guest.disks:
            node, _, _ = self._tops[disk.name]
            if node == disk.name:
                continue
            job = f"merge-{disk.name}"
            self.guest.qmp("block-commit", job_id=job, device=node, base_node=disk.name)
            while self.guest.wait_qmp_event("BLOCK_JOB_READY")["device"] != job:
                pass
            self.guest.qmp("block-job-complete", device=job)
            ended = self.guest.wait_qmp_event("BLOCK_JOB_COMPLETED")
            if "error" in ended:
                raise OSError(f"{job}: {ended['error']}")
            self._tops[disk.name] = (disk.name, disk.path, "raw")
        for overlay in self._overlays:
            overlay.unlink()
        self._overlays.clear()


@contextmanager
def loaded(guest: Guest) -> Iterator[Loaded]:
    """Have a guest's writers heard; at the end it is as it was."""
    with _port(guest) as path:
        acks = Acknowledgements(path)
        acks.start()
        this = Loaded(guest, acks)
        try:
            guest.run(f"until test -e /dev/virtio-ports/{PORT}; do sleep 0.1; done", timeout_s=60)
            yield this
            this.stop()
            this.merge()
        finally:
            acks.close()


@contextmanager
def _port(guest: Guest) -> Iterator[Path]:
    """Plug in a port for acknowledgements; a machine of libvirt's has one."""
    path = guest.dir / "acks.sock"
    if path.exists():
        yield path
        return
    listening = {"type": "unix", "data": {"path": str(path)}}
    guest.qmp("chardev-add", id="acks", backend={"type": "socket", "data": {"addr": listening, "wait": False}})
    guest.qmp("device_add", driver="virtserialport", bus="serial.0", chardev="acks", id="port-acks", name=PORT)
    try:
        yield path
    finally:
        guest.qmp("device_del", id="port-acks")
        while guest.wait_qmp_event("DEVICE_DELETED").get("device") != "port-acks":
            pass
        guest.qmp("chardev-remove", id="acks")
