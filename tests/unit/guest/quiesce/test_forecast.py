"""What a freeze would cover and in which order, by tables of mounts."""

from __future__ import annotations

import os

import pytest

from ballast.guest.linux.tree import Tree
from ballast.guest.quiesce.forecast import Plan, plan_freeze
from ballast.guest.quiesce.graph import Graph
from tests.unit.guest.conftest import MakeTree
from tests.unit.guest.quiesce.trees import MOUNTINFO, ROOT, points, table


def skips(plan: Plan) -> dict[str, str]:
    """Reasons, by mount point."""
    return {skipped.filesystem.mountpoint: skipped.reason for skipped in plan.skipped}


OVERLAY = "overlay cannot be frozen; what is written to it is on /"


@pytest.mark.parametrize("text", [None, "garbage\n"])
def test_a_table_that_cannot_be_read_is_an_error(make_tree: MakeTree, text: str | None) -> None:
    tree = make_tree({MOUNTINFO: text} if text else {})
    with pytest.raises((OSError, ValueError), match=r"garbage|No such file"):
        plan_freeze(tree)


def test_an_empty_table_is_an_empty_plan(make_tree: MakeTree) -> None:
    assert plan_freeze(make_tree({MOUNTINFO: ""})) == Plan((), ())


def test_recorded(recorded: Tree) -> None:
    """Loop files before the disk that holds them, one mount for each superblock, and every other thing by its name."""
    plan = plan_freeze(recorded)
    assert points(plan) == [["/mnt/loop", "/mnt/mapped"], ["/", "/mnt/data0", "/mnt/data1", "/mnt/data2"]]
    by_point = {filesystem.mountpoint: filesystem.mountpoints for filesystem in plan.filesystems}
    assert by_point["/mnt/data0"] == ("/mnt/data0", "/mnt/bind")
    assert by_point["/mnt/data2"] == ("/mnt/data2", "/mnt/volume")
    assert by_point["/mnt/loop"] == ("/mnt/loop", "/mnt/with blank")
    reasons = skips(plan)
    reasons.pop("/tmp", None)  # noqa: S108 - a tmpfs from Debian 13 on
    assert reasons == {
        "/mnt/read-only": "read-only",
        "/mnt/overlay": "overlay cannot be frozen; what is written to it is on /mnt/data1",
        "/mnt/auto": "autofs cannot be frozen",
    }


@pytest.mark.parametrize(
    ("mount", "reason"),
    [
        ("0:50 tmpfs tmpfs /srv/cache", "tmpfs cannot be frozen"),
        ("0:50 tmpfs tmpfs /running", "tmpfs cannot be frozen"),
        ("0:50 tmpfs tmpfs /run", None),
        ("0:50 tmpfs tmpfs /dev/shm", None),
        ("0:50 ramfs ramfs /run/credentials/x", None),
        ("0:50 overlay overlay /var/lib/docker/merged", "overlay cannot be frozen"),
        ("0:50 zfs tank/x /tank", "zfs cannot be frozen"),
        ("0:50 nfs4 host:/x /mnt/nfs", "nfs4 cannot be frozen"),
        ("0:50 nfs host:/x /mnt/nfs ro", "nfs cannot be frozen"),
        ("0:50 cifs //host/x /mnt/smb", "cifs cannot be frozen"),
        ("0:50 9p share /mnt/share", "9p cannot be frozen"),
        ("0:50 virtiofs share /mnt/share", "virtiofs cannot be frozen"),
        ("0:50 autofs systemd-1 /mnt/auto", "autofs cannot be frozen"),
        ("0:50 autofs systemd-1 /proc/sys/fs/binfmt_misc", None),
        ("0:50 fuse.sshfs host: /mnt/ssh", "fuse.sshfs cannot be frozen"),
        ("0:50 fuse mine /home/me/mine", "fuse cannot be frozen"),
        ("0:50 fuse.portal portal /run/user/1000/doc", None),
        ("8:3 vfat /dev/sda3 /boot/efi", "vfat cannot be frozen"),
        ("8:3 fuseblk /dev/sda3 /mnt/stick", "fuseblk cannot be frozen"),
        ("0:50 overlay overlay /live rw,lowerdir=/,upperdir=relative", "overlay cannot be frozen"),
        ("0:50 overlay overlay /live rw,lowerdir=/a,upperdir=/up\\054dir/x", OVERLAY),
        ("0:50 proc proc /proc", None),
        ("0:50 sysfs sysfs /srv/chroot/sys", None),
        ("0:50 cgroup2 cgroup2 /sys/fs/cgroup", None),
        ("7:5 squashfs /dev/loop5 /snap/core/1 ro", "read-only"),
        ("8:2 ext4 /dev/sda2 /boot ro", "read-only"),
    ],
)
def test_what_is_left_out_is_named_unless_nobody_would_miss_it(
    make_tree: MakeTree, mount: str, reason: str | None
) -> None:
    plan = plan_freeze(make_tree(table(ROOT, mount)))
    assert points(plan) == [["/"]]
    assert skips(plan) == ({mount.split()[3]: reason} if reason else {})


@pytest.mark.parametrize("mount", ["8:2 xfs /dev/sda2 /srv", "8:2 new-fs /dev/sda2 /srv"])
def test_whatever_is_on_a_block_device_is_tried(make_tree: MakeTree, mount: str) -> None:
    assert points(plan_freeze(make_tree(table(mount)))) == [["/srv"]]


def test_a_read_only_mount_of_a_writable_file_system_is_frozen(make_tree: MakeTree) -> None:
    """What counts is the superblock: somebody else writes by another mount, perhaps one that is not in the table."""
    tree = make_tree({MOUNTINFO: "20 1 8:2 / /srv ro,relatime - ext4 /dev/sda2 rw\n"})
    assert points(plan_freeze(tree)) == [["/srv"]]


def test_one_superblock_is_frozen_once(make_tree: MakeTree) -> None:
    mounts = (ROOT, "8:2 xfs /dev/sdb /srv", "8:1 ext4 /dev/sda1 /mnt/root", "8:2 xfs /dev/sdb /srv")
    plan = plan_freeze(make_tree(table(*mounts)))
    assert [filesystem.mountpoints for filesystem in plan.filesystems] == [("/", "/mnt/root"), ("/srv",)]


def test_subvolumes_are_one_btrfs_and_two_btrfs_are_two(make_tree: MakeTree) -> None:
    mounts = ("0:30 btrfs /dev/sda /", "0:30 btrfs /dev/sda /home", "0:31 btrfs /dev/sdb /srv")
    plan = plan_freeze(make_tree(table(*mounts)))
    assert [filesystem.mountpoints for filesystem in plan.filesystems] == [("/", "/home"), ("/srv",)]


@pytest.mark.parametrize(
    ("globs", "left"),
    [
        ([], ["/", "/srv", "/srv/db"]),
        (["/srv"], ["/", "/srv/db"]),
        (["/srv/*"], ["/", "/srv"]),
        (["/s*"], ["/"]),
        (["/bind"], ["/", "/srv"]),
        (["/srv/d[ab]", "/"], ["/srv"]),
        (["srv", "/SRV", "/no/such"], ["/", "/srv", "/srv/db"]),
    ],
)
def test_exclude_matches_any_of_a_file_system_s_mount_points(
    make_tree: MakeTree, globs: list[str], left: list[str]
) -> None:
    mounts = (ROOT, "8:2 xfs /dev/sdb /srv", "8:3 ext4 /dev/sdc /srv/db", "8:3 ext4 /dev/sdc /bind")
    plan = plan_freeze(make_tree(table(*mounts)), exclude=globs)
    assert [filesystem.mountpoint for filesystem in plan.filesystems] == left
    assert set(skips(plan).values()) <= {"excluded"}
    assert len(plan.skipped) == 3 - len(left)


@pytest.mark.parametrize(
    ("only", "frozen", "skipped"),
    [
        (None, ["/", "/srv"], {"/ram": "tmpfs cannot be frozen"}),
        ([], [], {}),
        (["/srv"], ["/srv"], {}),
        (["/bind"], ["/srv"], {}),
        (["/ram", "/"], ["/"], {"/ram": "tmpfs cannot be frozen"}),
        (["/no/such", "/srv/"], [], {}),
    ],
)
def test_only_names_mount_points(
    make_tree: MakeTree, only: list[str] | None, frozen: list[str], skipped: dict[str, str]
) -> None:
    mounts = (ROOT, "8:2 xfs /dev/sdb /srv", "8:2 xfs /dev/sdb /bind", "0:50 tmpfs tmpfs /ram")
    plan = plan_freeze(make_tree(table(*mounts)), only=only)
    assert [filesystem.mountpoint for filesystem in plan.filesystems] == frozen
    assert skips(plan) == skipped


def test_this_machine_s_own_table_can_be_read() -> None:
    filesystems = [*Graph(Tree()).filesystems.values()]
    assert all(filesystem.mountpoint.startswith("/") for filesystem in filesystems)
    assert os.path.ismount("/") == any("/" in filesystem.mountpoints for filesystem in filesystems)
