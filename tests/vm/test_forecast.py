"""What may go wrong in a freeze of a real guest: nothing if left alone; what is provoked has its culprit's name."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ballast.host.agent import Agent
from ballast.wire.names import Risk, Skipped
from tests.lab.guest import Guest

SCANNER = Path(__file__).parents[1] / "kernel/scanner.py"
HUNG_TASK = "/proc/sys/kernel/hung_task_panic"
HIDE = """
truncate -s 32M /mnt/data0/hidden.img
mkfs.ext4 -q /mnt/data0/hidden.img
mkdir -p /mnt/hidden
setsid unshare --mount sh -c 'mount -o loop /mnt/data0/hidden.img /mnt/hidden; exec sleep 600' </dev/null &>/dev/null &
until pid=$(pgrep -nx sleep) && grep -q /mnt/hidden /proc/$pid/mountinfo; do sleep 0.1; done
echo $pid >/run/hidden.pid
cat /run/hidden.pid
"""
SHOW = """
kill $(cat /run/hidden.pid)
while [ -e /proc/$(cat /run/hidden.pid) ]; do sleep 0.1; done
rm -f /mnt/data0/hidden.img /run/hidden.pid
rmdir /mnt/hidden
"""
# Each culprit of its own kind, and a name that says which it is.
PROVOKE = """
setsid python3 /run/scanner.py /mnt/data1 mount </dev/null >/run/scanner.out 2>&1 &
echo $! >/run/scanner.pid
dd if=/dev/zero of=/mnt/data0/swap bs=1M count=8 status=none
chmod 600 /mnt/data0/swap
mkswap -q /mnt/data0/swap
swapon /mnt/data0/swap
systemd-run --quiet --unit=lab-soon --on-calendar="$(date -ud '+300 sec' '+%F %T UTC')" \
    --timer-property=Persistent=yes --timer-property=AccuracySec=1s true
until grep -q marked /run/scanner.out; do sleep 0.1; done
cat /run/scanner.pid
"""
CALM = """
systemctl stop lab-soon.timer
rm -f /var/lib/systemd/timers/stamp-lab-soon.timer
swapoff /mnt/data0/swap
kill $(cat /run/scanner.pid)
while [ -e /proc/$(cat /run/scanner.pid) ]; do sleep 0.1; done
rm -f /mnt/data0/swap /run/scanner.*
"""
# A file system whose server never answers: whoever opens it waits until that is killed.
DEAD = """
import ctypes, os, signal
fd = os.open("/dev/fuse", os.O_RDWR)
options = f"fd={fd},rootmode=40000,user_id=0,group_id=0".encode()
if ctypes.CDLL(None).mount(b"dead", b"/mnt/dead", b"fuse", 0, options):
    raise SystemExit("cannot mount")
print("mounted", flush=True)
signal.pause()
"""
# A file in a file system in a file, once over multipath with a single path; what cannot be frozen; an automount point.
STACK = """
mkdir -p /mnt/{outer,mapped,over,ram,auto,dead}
modprobe fuse
setsid python3 /run/dead.py </dev/null >/run/dead.out 2>&1 &
echo $! >/run/dead.pid
truncate -s 96M /mnt/data0/outer.img
mkfs.ext4 -q /mnt/data0/outer.img
mount -o loop /mnt/data0/outer.img /mnt/outer
mkdir /mnt/outer/{upper,work}
mount -t overlay overlay -o lowerdir=/mnt/data0,upperdir=/mnt/outer/upper,workdir=/mnt/outer/work /mnt/over
truncate -s 64M /mnt/over/inner.img
mkfs.ext4 -q /mnt/over/inner.img
device=$(losetup --find --show /mnt/over/inner.img)
modprobe --all dm_multipath dm_round_robin
dmsetup create lab-mapped --uuid mpath-lab \
    --table "0 $(blockdev --getsz $device) multipath 1 queue_if_no_path 0 1 1 round-robin 0 1 1 $device 1"
mount /dev/mapper/lab-mapped /mnt/mapped
mount -t tmpfs tmpfs /mnt/ram
systemd-mount --automount=yes --quiet tmpfs /mnt/auto -t tmpfs
until grep -q mounted /run/dead.out; do sleep 0.1; done
"""
UNSTACK = """
kill $(cat /run/dead.pid)
while [ -e /proc/$(cat /run/dead.pid) ]; do sleep 0.1; done
umount /mnt/dead
systemctl stop mnt-auto.automount
umount /mnt/ram /mnt/mapped
device=/dev/$(ls /sys/class/block/dm-0/slaves)
dmsetup remove lab-mapped
losetup --detach $device
umount /mnt/over
umount /mnt/outer
rm -f /mnt/data0/outer.img /run/dead.*
rmdir /mnt/{outer,mapped,over,ram,auto,dead}
"""


@pytest.fixture
def hidden(guest: Guest) -> Iterator[int]:
    """A process that alone has a file system mounted."""
    yield int(guest.run(HIDE, timeout_s=60).stdout)
    guest.run(SHOW, timeout_s=60)


@pytest.fixture
def panicking(guest: Guest) -> Iterator[None]:
    """A kernel that panics when a task waits for two minutes."""
    guest.run(f"echo 1 >{HUNG_TASK}")
    yield
    guest.run(f"echo 0 >{HUNG_TASK}")


@pytest.fixture
def scanner(guest: Guest) -> Iterator[int]:
    """A process that has to permit what is opened on /mnt/data1; a swap file; a timer that is due in five minutes."""
    guest.put("/run/scanner.py", SCANNER.read_bytes())
    yield int(guest.run(PROVOKE, timeout_s=60).stdout)
    guest.run(CALM, timeout_s=60)


@pytest.fixture
def stacked(guest: Guest) -> Iterator[None]:
    """File systems in files of others."""
    guest.put("/run/dead.py", DEAD.encode())
    guest.run(STACK, timeout_s=60)
    yield
    guest.run(UNSTACK, timeout_s=60)


async def test_a_guest_that_is_left_alone_has_no_risks(
    guest: Guest, vsock: str, token: str, measured: Callable[[str], None]
) -> None:
    async with Agent.connect(vsock, token) as agent:
        guest.run("dd if=/dev/zero of=/mnt/data0/dirty bs=1M count=16 status=none")
        started_s = time.monotonic()
        told = await agent.quiesce_forecast()
        measured(f"forecast: {1000 * (time.monotonic() - started_s):.0f} ms")
        guest.run("rm /mnt/data0/dirty")
    (level,) = told.order
    assert {"/", "/mnt/data0", "/mnt/data1", "/mnt/data2"} <= set(level)
    assert told.risks == []
    assert told.dirty_bytes > 0


@pytest.mark.usefixtures("panicking")
async def test_a_risk_has_its_culprit_s_name(hidden: int, vsock: str, token: str) -> None:
    async with Agent.connect(vsock, token) as agent:
        told = {risk.kind: risk.detail for risk in (await agent.quiesce_forecast()).risks}
        assert told.keys() == {"hung-task-panic", "hidden-disk"}
        assert f"(ext4) is mounted for sleep ({hidden}) alone, at /mnt/hidden" in told["hidden-disk"]
        brief = {risk.kind for risk in (await agent.quiesce_forecast(lease_ms=10_000)).risks}
        assert brief == {"hidden-disk"}


async def test_what_only_others_know_has_its_culprit_s_name_too(
    guest: Guest, scanner: int, vsock: str, token: str, measured: Callable[[str], None]
) -> None:
    started = guest.run("date +%s").stdout.strip()
    async with Agent.connect(vsock, token) as agent:
        told = {risk.kind: risk.detail for risk in (await agent.quiesce_forecast(lease_ms=599_000)).risks}
        brief = {risk.kind for risk in (await agent.quiesce_forecast(lease_ms=1_000)).risks}
        elsewhere = {risk.kind for risk in (await agent.quiesce_forecast(1_000, ["/mnt/data1"])).risks}
        started_s = time.monotonic()
        begun = await agent.quiesce_begin("scanned", 30_000, mountpoints=["/mnt/data1"])
        measured(f"begin, what others told known: {1000 * (time.monotonic() - started_s):.0f} ms")
        await agent.quiesce_end("scanned")
    journal = guest.run("journalctl --unit=ballast-agent --lines=40 --output=cat").stdout
    # A lease of ten minutes is too long for journald as well.
    assert told.keys() == {"fanotify", "timer", "swap-file", "logger"}
    assert told["fanotify"].startswith(f"python3 ({scanner}) has to permit whatever is opened on /mnt/data1;")
    assert told["timer"].startswith("lab-soon.timer is due in ")
    assert told["swap-file"].startswith("/mnt/data0/swap is swapped to while /mnt/data0 is frozen")
    assert brief == {"fanotify", "swap-file"}
    assert elsewhere == {"fanotify"} == {risk.kind for risk in begun.risks}
    assert f"freeze scanned: fanotify: {told['fanotify']}" in journal
    looked = f"journalctl --since=@{started} --quiet --output=cat --grep=ballast-look"
    assert guest.run(looked, check=False).stdout == "", "a look that went well is no line in the journal"


@pytest.mark.usefixtures("stacked")
async def test_children_are_frozen_before_what_holds_them(guest: Guest, vsock: str, token: str) -> None:
    """The other way round the child's last writes would wait for its parent: the freeze would not come to an end.

    Nor would it if anybody opened the file system whose server is dead.
    """
    async with Agent.connect(vsock, token) as agent:
        told = await agent.quiesce_forecast()
        guest.run("dmsetup message lab-mapped 0 fail_if_no_path")
        later = await agent.quiesce_forecast()
        guest.run("for place in /mnt/mapped /mnt/outer /mnt/data0; do echo data >$place/dirty; done")
        begun = await agent.quiesce_begin("stacked", 30_000)
        ended = await agent.quiesce_end("stacked")
    guest.run("rm /mnt/{mapped,outer,data0}/dirty")
    queues = "lab-mapped queues for ever when its last path fails (queue_if_no_path), and with it /mnt/mapped"
    assert told.risks == [Risk("multipath", queues)]
    assert later.risks == []
    assert told.order[:2] == [["/mnt/mapped"], ["/mnt/outer"]]
    assert "/mnt/data0" in told.order[2]
    assert {
        Skipped("/mnt/over", "overlay cannot be frozen; what is written to it is on /mnt/outer"),
        Skipped("/mnt/ram", "tmpfs cannot be frozen"),
        Skipped("/mnt/auto", "autofs cannot be frozen"),
        Skipped("/mnt/dead", "fuse cannot be frozen"),
    } <= set(told.skip)
    assert {one.state for one in begun.filesystems} == {"frozen", "skipped"}
    assert ended.held
    mounts = guest.run("grep ' /mnt/auto ' /proc/mounts").stdout.splitlines()
    assert [line.split()[2] for line in mounts] == ["autofs"], "somebody has opened the automount point"
