"""What may go wrong in a freeze, by trees of files: each risk with its culprit, and none that is not there."""

from __future__ import annotations

import pytest

from ballast.guest.config import Quiesce as Settings
from ballast.guest.linux.tree import Tree
from ballast.guest.quiesce.forecast import plan_freeze
from ballast.guest.quiesce.outlook import Outlook
from ballast.guest.quiesce.risks import find_risks, foretell
from ballast.wire.errors import AgentError, BadRequest
from ballast.wire.names import QuiesceForecast, Risk, Skipped
from tests.unit.guest.conftest import MakeTree

LEASE_S = 120.0
ROOT = "20 1 8:1 / / rw - ext4 /dev/sda1 rw\n"
SRV = "21 20 8:17 / /srv rw - xfs /dev/sdb1 rw\n"
CACHE = "22 20 0:30 / /srv/cache rw - tmpfs tmpfs rw\n"
HIDDEN = "90 80 8:33 / /mnt/vol rw - ext4 /dev/sdc1 rw\n"
ETAB = "/srv\t*(rw,sync)\n/srv/deep\t10.0.0.0/8(ro)\n"
WATCHDOG = {
    "sys/class/watchdog/watchdog0/state": "active\n",
    "sys/class/watchdog/watchdog0/timeout": "30\n",
    "sys/class/watchdog/watchdog0/identity": "i6300ESB timer\n",
}
HUNG = {"proc/sys/kernel/hung_task_timeout_secs": "60\n", "proc/sys/kernel/hung_task_panic": "1\n"}
NFS = {"proc/fs/nfsd/threads": "8\n", "var/lib/nfs/etab": ETAB}


def risks(make_tree: MakeTree, files: dict[str, str], lease_s: float = LEASE_S) -> list[Risk]:
    """What is found beside a root and a data disk."""
    tree = make_tree({"proc/1/mountinfo": ROOT + SRV + CACHE, "proc/1/comm": "systemd\n"} | files)
    return find_risks(tree, plan_freeze(tree), lease_s)


def test_a_quiet_system_has_no_risks(make_tree: MakeTree) -> None:
    assert risks(make_tree, {}) == []


def test_no_recorded_guest_has_risks(recorded: Tree) -> None:
    assert find_risks(recorded, plan_freeze(recorded), LEASE_S) == []


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
        ({"proc/9/comm": "auditd\n", "proc/9/mountinfo": ""}, 1, "logger", "auditd (9)"),
        ({"var/log/journal/x/system.journal": ""}, 181, "logger", "systemd-journald that waits for 180 s"),
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
        (NFS | {"var/lib/nfs/etab": "/srv/cache\t*(rw)\n", "proc/1/mountinfo": CACHE}, 600),
        ({"proc/77/mountinfo": ROOT + CACHE, "proc/77/comm": "sh\n"}, 600),
        ({"proc/77/mountinfo": ROOT + "91 80 0:99 / /x rw - tmpfs none rw\n", "proc/77/comm": "sh\n"}, 600),
        ({"var/log/journal/x/system.journal": ""}, 180),
    ],
)
def test_what_cannot_happen_is_no_risk(make_tree: MakeTree, files: dict[str, str], lease_s: float) -> None:
    assert risks(make_tree, files, lease_s) == []


def test_each_hidden_disk_is_told_once(make_tree: MakeTree) -> None:
    shims = {f"proc/{pid}/{name}": text for pid in (70, 71) for name, text in (("comm", "sh"), ("mountinfo", HIDDEN))}
    other = {"proc/72/comm": "sh", "proc/72/mountinfo": ROOT + HIDDEN}
    assert [risk.kind for risk in risks(make_tree, shims | other)] == ["hidden-disk"]


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


def test_a_forecast_has_order_skips_and_dirty_bytes(make_tree: MakeTree) -> None:
    meminfo = "MemTotal: 1 kB\nDirty:              100 kB\nWriteback:            28 kB\nWritebackTmp:     4 kB\n"
    tree = make_tree({"proc/1/mountinfo": ROOT + SRV + CACHE, "proc/meminfo": meminfo})
    told = foretell(tree, plan_freeze(tree), LEASE_S)
    assert told == QuiesceForecast([["/", "/srv"]], [Skipped("/srv/cache", "tmpfs cannot be frozen")], [], 128 << 10)


async def test_a_peer_gets_it_for_the_configured_lease(make_tree: MakeTree) -> None:
    meminfo = {"proc/meminfo": "Dirty: 0 kB\n"}
    outlook = Outlook(make_tree({"proc/1/mountinfo": ROOT + SRV} | meminfo | HUNG), Settings(lease_ms=60_000))
    assert [risk.kind for risk in (await outlook.forecast()).risks] == ["hung-task-panic"]
    assert (await outlook.forecast(59_000)).risks == []
    assert (await outlook.forecast(mountpoints=["/srv"])).order == [["/srv"]]
    assert (await outlook.forecast(exclude=["/s*"])).order == [["/"]]
    with pytest.raises(BadRequest, match="'lease-ms' expects 1000 to 600000"):
        await outlook.forecast(999)
    with pytest.raises(BadRequest, match="'mountpoints' names no mount point: /nowhere"):
        await outlook.forecast(mountpoints=["/nowhere"])


async def test_a_system_without_proc_is_an_error(make_tree: MakeTree) -> None:
    with pytest.raises(AgentError, match="cannot read the table of mounts"):
        await Outlook(make_tree({}), Settings()).forecast()
    with pytest.raises(AgentError, match="cannot look at the system"):
        await Outlook(make_tree({"proc/1/mountinfo": ROOT}), Settings()).forecast()
