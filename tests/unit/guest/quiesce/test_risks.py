"""What may go wrong in a freeze, by trees of files: each risk with its culprit, and none that is not there."""

from __future__ import annotations

import asyncio

import pytest

from ballast.guest.linux.tree import Tree
from ballast.guest.quiesce.forecast import plan_freeze
from ballast.guest.quiesce.graph import Graph
from ballast.guest.quiesce.risks import READERS, Freeze, find_risks
from ballast.wire.names import Risk
from tests.unit.guest.conftest import MakeTree

LEASE_S = 120.0
DEADLINE_S = 10.0
ROOT = "20 1 8:1 / / rw - ext4 /dev/sda1 rw\n"
SRV = "21 20 8:17 / /srv rw - xfs /dev/sdb1 rw\n"
CACHE = "22 21 0:30 / /srv/cache rw - tmpfs tmpfs rw\n"
LOG = "24 20 0:32 / /var/log rw - nfs4 dead:/ rw\n"
RUN = "23 20 0:31 / /run rw - tmpfs tmpfs rw\n"
HIDDEN = "90 80 8:33 / /mnt/vol rw - ext4 /dev/sdc1 rw\n"
ETAB = "/srv\t*(rw,sync)\n/srv/deep\t10.0.0.0/8(ro)\n"
WATCHDOG = {
    "sys/class/watchdog/watchdog0/state": "active\n",
    "sys/class/watchdog/watchdog0/timeout": "30\n",
    "sys/class/watchdog/watchdog0/identity": "i6300ESB timer\n",
}
HUNG = {"proc/sys/kernel/hung_task_timeout_secs": "60\n", "proc/sys/kernel/hung_task_panic": "1\n"}
SWAPS = "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n"
BLOCK = {"sys/class/block/loop0/loop/backing_file": "/srv/swap.img\n", "sys/class/block/sdb2/dev": "8:18\n"}
IMAGE = "30 20 7:0 / /image rw - ext4 /dev/loop0 rw\n"
NFS = {"proc/fs/nfsd/threads": "8\n", "var/lib/nfs/etab": ETAB}


def risks(make_tree: MakeTree, files: dict[str, str], lease_s: float = LEASE_S) -> list[Risk]:
    """What is found beside a root and a data disk."""
    tree = make_tree({"proc/1/mountinfo": ROOT + SRV + CACHE + RUN, "proc/1/comm": "systemd\n"} | files)
    return find(tree, lease_s)


def find(tree: Tree, lease_s: float = LEASE_S) -> list[Risk]:
    """What is found in a tree."""
    freeze = Freeze(tree, Graph(tree), plan_freeze(tree), lease_s)
    return asyncio.run(find_risks(freeze, READERS, timeout_s=DEADLINE_S))


def test_a_quiet_system_has_no_risks(make_tree: MakeTree) -> None:
    assert risks(make_tree, {}) == []


def test_no_recorded_guest_has_risks(recorded: Tree) -> None:
    assert find(recorded) == []


@pytest.mark.parametrize(
    ("files", "lease_s", "kind", "culprit"),
    [
        (HUNG, 60, "hung-task-panic", "waits for 60 s"),
        (WATCHDOG, 30, "watchdog", "watchdog0 (i6300ESB timer) resets the guest when nobody has fed it for 30 s"),
        (NFS | {"var/lib/nfs/etab": "/srv\t*(rw)\n"}, 1, "nfs-export", "clients of the export /srv wait"),
        (
            {"proc/77/mountinfo": ROOT + HIDDEN, "proc/77/comm": "containerd-shim\n"},
            1,
            "hidden-disk",
            "/dev/sdc1 (ext4) is mounted for containerd-shim (77) alone, at /mnt/vol",
        ),
        ({"proc/9/comm": "auditd\n", "proc/9/mountinfo": "", "var/log/audit/x": ""}, 1, "logger", "auditd (9)"),
        ({"var/log/journal/x/system.journal": ""}, 181, "logger", "systemd-journald that waits for 180 s"),
        (
            {"proc/swaps": SWAPS + "/srv/a\\040swap file 1024 0 -2\n"},
            1,
            "swap-file",
            "/srv/a swap is swapped to while /srv is frozen, so its disk is not still",
        ),
        (
            {"proc/swaps": SWAPS + "/dev/loop0 partition 1024 0 -2\n"} | BLOCK,
            1,
            "swap-file",
            "swapping to /dev/loop0 waits for /srv, and with it whoever needs memory",
        ),
        ({"proc/1/mountinfo": ROOT + SRV}, 1, "own-file", "Ballast's own /run/ballast is on /, and not on a tmpfs"),
        (
            NFS | {"proc/1/mountinfo": ROOT + RUN + "30 20 0:9 / /var/lib rw - nfs4 dead:/ rw\n"},
            1,
            "nfs-export",
            "cannot tell: /var/lib/nfs/etab is on nfs4, which may not answer",
        ),
    ],
)
def test_a_risk_names_its_culprit(
    make_tree: MakeTree, files: dict[str, str], lease_s: float, kind: str, culprit: str
) -> None:
    (risk,) = risks(make_tree, files, lease_s)
    assert risk.kind == kind
    assert culprit in risk.detail


@pytest.mark.parametrize(
    ("files", "lease_s"),
    [
        (HUNG, 59.9),
        (HUNG | {"proc/sys/kernel/hung_task_panic": "0\n"}, 600),
        (HUNG | {"proc/sys/kernel/hung_task_timeout_secs": "0\n"}, 600),
        (WATCHDOG, 29),
        (WATCHDOG | {"sys/class/watchdog/watchdog0/state": "inactive\n"}, 600),
        (NFS | {"proc/fs/nfsd/threads": "0\n"}, 600),
        (NFS | {"var/lib/nfs/etab": "/srv/cache\t*(rw)\n", "proc/1/mountinfo": CACHE + RUN}, 600),
        ({"proc/77/mountinfo": ROOT + CACHE, "proc/77/comm": "sh\n"}, 600),
        ({"proc/77/mountinfo": ROOT + "91 80 0:99 / /x rw - tmpfs none rw\n", "proc/77/comm": "sh\n"}, 600),
        ({"var/log/journal/x/system.journal": ""}, 180),
        ({"var/log/journal/x/system.journal": "", "proc/1/mountinfo": ROOT + LOG + RUN}, 600),
        ({"proc/swaps": SWAPS}, 600),
        ({"proc/swaps": SWAPS + "/dev/sdb2 partition 1024 0 -2\n/dev/zram0 partition 1 0 100\n"} | BLOCK, 600),
        ({"proc/swaps": SWAPS + "/srv/cache/swap file 1024 0 -2\n"}, 600),
    ],
)
def test_what_cannot_happen_is_no_risk(make_tree: MakeTree, files: dict[str, str], lease_s: float) -> None:
    assert risks(make_tree, files, lease_s) == []


def test_each_hidden_disk_is_told_once(make_tree: MakeTree) -> None:
    shims = {f"proc/{pid}/{name}": text for pid in (70, 71) for name, text in (("comm", "sh"), ("mountinfo", HIDDEN))}
    other = {"proc/72/comm": "sh", "proc/72/mountinfo": ROOT + HIDDEN}
    assert [risk.kind for risk in risks(make_tree, shims | other)] == ["hidden-disk"]


def test_a_swap_file_on_a_loop_device_is_two_risks(make_tree: MakeTree) -> None:
    files = {"proc/1/mountinfo": ROOT + SRV + RUN + IMAGE, "proc/swaps": SWAPS + "/image/swap file 1024 0 -2\n"}
    loop = {"sys/dev/block/7:0/loop/backing_file": "/srv/image.img\n"}
    assert [risk.detail.split(",")[0] for risk in risks(make_tree, files | loop)] == [
        "swapping to /image/swap waits for /srv",
        "/image/swap is swapped to while /image is frozen",
    ]


def test_nothing_is_opened_but_proc_sys_and_what_is_local(make_tree: MakeTree, opened: list[str]) -> None:
    """A dead server and an automounter would not answer."""
    remote = "40 20 0:40 / /var/log rw - nfs4 dead:/ rw\n41 20 0:41 / /var/lib/nfs rw - autofs systemd-1 rw\n"
    there = {"var/log/journal/x": "", "var/lib/systemd/timers/x": "", "proc/9/comm": "auditd\n", "proc/9/mountinfo": ""}
    tree = make_tree(NFS | there | {"proc/1/mountinfo": ROOT + RUN + remote})
    opened.clear()
    assert [risk.detail[:11] for risk in find(tree, 600)] == ["cannot tell"]
    assert opened
    assert {name.split("/")[0] for name in opened} <= {"proc", "sys"}


def test_a_process_that_has_ended_is_passed_over(make_tree: MakeTree) -> None:
    files = {"proc/70/status": "", "proc/71/comm": "sh", "proc/71/mountinfo": HIDDEN}
    assert [risk.detail[:9] for risk in risks(make_tree, files)] == ["/dev/sdc1"]


@pytest.mark.parametrize(
    ("files", "kind"),
    [
        (HUNG | {"proc/sys/kernel/hung_task_panic": "?"}, "hung-task-panic"),
        ({"proc/70/mountinfo": "garbage\n", "proc/70/comm": "sh"}, "hidden-disk"),
    ],
)
def test_what_cannot_be_read_is_no_no(make_tree: MakeTree, files: dict[str, str], kind: str) -> None:
    (risk,) = risks(make_tree, files)
    assert risk.kind == kind
    assert risk.detail.startswith("cannot tell: ")
