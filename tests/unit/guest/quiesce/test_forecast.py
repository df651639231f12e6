"""What a freeze would cover and in which order, by tables of mounts."""

from __future__ import annotations

import os
from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ballast.guest.linux.tree import Tree
from ballast.guest.quiesce.forecast import Plan, plan_freeze, read_filesystems
from tests.unit.guest.conftest import MakeTree

MOUNTINFO = "proc/1/mountinfo"


def table(*mounts: str) -> dict[str, str]:
    """Mounts as "device type source mountpoint [ro]", in a table as the kernel writes it."""
    lines = []
    for number, mount in enumerate(mounts, 20):
        device, kind, source, point, mode = (*mount.split(), "rw")[:5]
        lines.append(f"{number} 1 {device} / {point} rw,relatime shared:1 - {kind} {source} {mode}\n")
    return {MOUNTINFO: "".join(lines)}


def points(plan: Plan) -> list[list[str]]:
    """Mount points, level by level."""
    return [[filesystem.mountpoint for filesystem in level] for level in plan.levels]


def skips(plan: Plan) -> dict[str, str]:
    """Reasons, by mount point."""
    return {skipped.filesystem.mountpoint: skipped.reason for skipped in plan.skipped}


ROOT = "8:1 ext4 /dev/sda1 /"


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
        "/mnt/overlay": "overlay cannot be frozen",
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


@pytest.mark.parametrize("mount", ["8:2 xfs /dev/sda2 /srv", "8:2 fuseblk /dev/sda2 /srv", "8:2 new-fs /dev/sda2 /srv"])
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


def loop(device: str, file: str) -> dict[str, str]:
    """A loop device in sysfs."""
    return {f"sys/dev/block/{device}/loop/backing_file": f"{file}\n"}


def test_a_loop_file_s_file_system_comes_before_the_one_that_holds_it(make_tree: MakeTree) -> None:
    mounts = (ROOT, "8:2 xfs /dev/sdb /srv", "7:0 ext4 /dev/loop0 /a", "7:1 ext4 /dev/loop1 /b")
    tree = make_tree(table(*mounts) | loop("7:0", "/srv/images/a.img") | loop("7:1", "/a/b.img (deleted)"))
    assert points(plan_freeze(tree)) == [["/b"], ["/a"], ["/", "/srv"]]


def test_a_loop_file_on_what_is_not_frozen_has_no_holder(make_tree: MakeTree) -> None:
    mounts = ("8:2 xfs /dev/sdb /srv", "0:50 tmpfs tmpfs /ram", "7:0 ext4 /dev/loop0 /a")
    tree = make_tree(table(*mounts) | loop("7:0", "/ram/a.img"))
    assert points(plan_freeze(tree)) == [["/srv", "/a"]]


def test_a_name_that_only_begins_like_a_mount_point_is_not_on_it(make_tree: MakeTree) -> None:
    mounts = ("8:2 xfs /dev/sdb /srv", "7:0 ext4 /dev/loop0 /a")
    tree = make_tree(table(*mounts) | loop("7:0", "/srv.img"))
    assert points(plan_freeze(tree)) == [["/srv", "/a"]]


def test_through_device_mapper_md_and_partitions(make_tree: MakeTree) -> None:
    mounts = (
        ROOT,
        "253:1 ext4 /dev/mapper/upper /upper",
        "9:0 xfs /dev/md0 /raid",
        "259:0 ext4 /dev/loop7p1 /part",
        "253:9 ext4 /dev/mapper/plain /plain",
    )
    tree = make_tree(
        table(*mounts)
        | {"sys/dev/block/253:1/slaves/dm-0/slaves/loop0/loop/backing_file": "/a.img\n"}
        | {"sys/dev/block/9:0/slaves/sdz/dev": "8:99\n", "sys/dev/block/9:0/slaves/loop1/loop/backing_file": "/b.img\n"}
        | {"sys/devices/loop7/loop/backing_file": "/c.img\n", "sys/devices/loop7/loop7p1/partition": "1\n"}
        | {"sys/dev/block/253:9/slaves/sdy/dev": "8:98\n"}
    )
    tree.path("sys/dev/block/259:0").symlink_to("../../devices/loop7/loop7p1")
    plan = plan_freeze(tree)
    assert points(plan) == [["/upper", "/raid", "/part"], ["/", "/plain"]]


def test_btrfs_on_a_loop_device_is_found_by_its_source(make_tree: MakeTree) -> None:
    mounts = (ROOT, "0:44 btrfs /dev/loop3 /vol")
    files = table(*mounts) | loop("7:3", "/vol.img") | {"sys/class/block/loop3/dev": "7:3\n"}
    assert points(plan_freeze(make_tree(files))) == [["/vol"], ["/"]]


def test_loop_files_that_hold_each_other_come_to_an_end(make_tree: MakeTree) -> None:
    """A lazily unmounted mount point can make it look so."""
    tree = make_tree(
        table("7:0 ext4 /dev/loop0 /a", "7:1 ext4 /dev/loop1 /b") | loop("7:0", "/b/x") | loop("7:1", "/a/x")
    )
    assert sorted(filesystem.mountpoint for filesystem in plan_freeze(tree).filesystems) == ["/a", "/b"]


@settings(max_examples=40)
@given(parents=st.lists(st.integers(0, 20), max_size=10))
def test_every_child_is_frozen_before_its_parent_and_nothing_twice(
    tmp_path_factory: pytest.TempPathFactory, parents: Iterable[int]
) -> None:
    """Loop device i has its file on the file system of an earlier one, or on the root."""
    root = tmp_path_factory.mktemp("kernel")
    files: dict[str, str] = {}
    mounts, parent_of = [ROOT], {}
    for number, chosen in enumerate(parents):
        device, parent = f"7:{number}", chosen % (number + 1) - 1
        mounts.append(f"{device} ext4 /dev/loop{number} /mnt/{number}")
        parent_of[device] = f"7:{parent}" if parent >= 0 else "8:1"
        files |= loop(device, f"/mnt/{parent}/{number}.img" if parent >= 0 else f"/{number}.img")
    for name, text in (files | table(*mounts)).items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    plan = plan_freeze(Tree(root))
    level = {filesystem.device: number for number, one in enumerate(plan.levels) for filesystem in one}
    assert len(plan.filesystems) == len(level) == len(mounts)
    assert all(level[child] < level[parent] for child, parent in parent_of.items())


def test_this_machine_s_own_table_can_be_read() -> None:
    filesystems = read_filesystems(Tree())
    assert all(filesystem.mountpoint.startswith("/") for filesystem in filesystems)
    assert os.path.ismount("/") == any("/" in filesystem.mountpoints for filesystem in filesystems)
