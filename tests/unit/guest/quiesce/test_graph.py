"""Children before what backs them, by trees of files: through every kind of device and of mount that lies between."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ballast.guest.linux.tree import Tree
from ballast.guest.quiesce.forecast import plan_freeze
from ballast.guest.quiesce.graph import Graph
from tests.unit.guest.conftest import MakeTree
from tests.unit.guest.quiesce.trees import ROOT, loop, points, table


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


def file_below(device: str, file: str = "/x.img") -> dict[str, str]:
    """A loop device somewhere below a device in sysfs."""
    return {f"sys/{device}/loop/backing_file": f"{file}\n"}


@pytest.mark.parametrize(
    ("mount", "files"),
    [
        ("253:1 ext4 /dev/mapper/crypt /top", file_below("dev/block/253:1/slaves/loop0")),
        ("253:1 ext4 /dev/mapper/vg-lv /top", file_below("dev/block/253:1/slaves/dm-0/slaves/md0/slaves/loop0")),
        (
            "9:0 xfs /dev/md0 /top",
            file_below("dev/block/9:0/slaves/sdz/none") | file_below("dev/block/9:0/slaves/loop1"),
        ),
        ("0:44 btrfs /dev/loop3 /top", file_below("class/block/loop3")),
        (
            "0:44 btrfs /dev/mapper/vol /top",
            {"sys/class/block/dm-3/dm/name": "vol\n"} | file_below("class/block/dm-3/slaves/loop1"),
        ),
        (
            "0:44 btrfs /dev/sdb /top",
            {
                "sys/class/block/sdb/dev": "8:16",
                "sys/fs/btrfs/u/devices/sdb/x": "",
                "sys/fs/btrfs/u/devices/loop1/x": "",
            }
            | file_below("class/block/loop1"),
        ),
        (
            "7:1 ext4 /dev/loop1 /top",
            file_below("dev/block/7:1", "/dev/mapper/vol")
            | {"sys/class/block/dm-3/dm/name": "vol\n"}
            | file_below("class/block/dm-3/slaves/loop1"),
        ),
    ],
    ids=["dm-crypt", "LVM on md on loop", "md", "btrfs", "btrfs on dm", "btrfs on two disks", "a loop on a device"],
)
def test_a_file_is_found_through_every_kind_of_device(make_tree: MakeTree, mount: str, files: dict[str, str]) -> None:
    tree = make_tree(table(ROOT, mount, "8:99 ext4 /dev/sdy /beside") | files)
    assert points(plan_freeze(tree)) == [["/top"], ["/", "/beside"]]


def test_a_partition_is_on_its_disk_s_file(make_tree: MakeTree) -> None:
    files = file_below("devices/loop7") | {"sys/devices/loop7/loop7p1/partition": "1\n"}
    tree = make_tree(table(ROOT, "259:0 ext4 /dev/loop7p1 /part") | files | {"sys/dev/block/7:9": ""})
    tree.path("sys/dev/block/259:0").symlink_to("../../devices/loop7/loop7p1")
    assert points(plan_freeze(tree)) == [["/part"], ["/"]]


DATA = "8:16 xfs /dev/sdb /data"
IMAGE = "7:0 ext4 /dev/loop0 /image"


@pytest.mark.parametrize(
    ("mounts", "file"),
    [
        ([DATA], "/data/x.img"),
        ([DATA, "8:16 xfs /dev/sdb /bind"], "/bind/x.img"),
        ([DATA, "0:50 tmpfs none /data/in", "8:16 xfs /dev/sdb /data/in/bind"], "/data/in/bind/x.img"),
        ([DATA, "0:60 overlay o /over rw,lowerdir=/,upperdir=/data/up,workdir=/data/work"], "/over/x.img"),
        (
            [
                DATA,
                "0:60 overlay o /over rw,lowerdir=/,upperdir=/data/up,workdir=/data/work",
                "0:61 overlay o /more rw,lowerdir=/,upperdir=/over/up,workdir=/over/work",
            ],
            "/more/x.img",
        ),
        (["8:99 ext4 /dev/sdy /data/deep", DATA], "/data/deep/x.img"),
        (["8:99 ext4 /dev/sdy /data", DATA], "/data/x.img"),
    ],
    ids=["disk", "bind", "bind in tmpfs", "overlay", "overlay on overlay", "what was mounted over", "the later of two"],
)
def test_a_file_is_on_what_the_kernel_finds_there(make_tree: MakeTree, mounts: list[str], file: str) -> None:
    plan = plan_freeze(make_tree(table(ROOT, *mounts, IMAGE) | loop("7:0", file)))
    first, second = points(plan)
    assert first[-1:] == ["/image"]
    assert "/data" in [point for f in plan.levels[1] if f.device == "8:16" for point in f.mountpoints]
    assert "/" in second


def test_subvolumes_hold_files_as_their_btrfs_does(make_tree: MakeTree) -> None:
    mounts = (ROOT, "0:30 btrfs /dev/sdb /pool", "0:30 btrfs /dev/sdb /home", IMAGE)
    assert points(plan_freeze(make_tree(table(*mounts) | loop("7:0", "/home/x.img")))) == [["/image"], ["/", "/pool"]]


@pytest.mark.parametrize(("only", "exclude"), [(None, ["/middle"]), (["/top", "/"], [])])
def test_what_is_not_frozen_still_lies_between(make_tree: MakeTree, only: list[str] | None, exclude: list[str]) -> None:
    """The top's last writes go to the middle's disk, which is a file on the root: so the root must come later."""
    mounts = (ROOT, "7:0 ext4 /dev/loop0 /middle", "7:1 ext4 /dev/loop1 /top")
    tree = make_tree(table(*mounts) | loop("7:0", "/m.img") | loop("7:1", "/middle/t.img"))
    assert points(plan_freeze(tree, only=only, exclude=exclude)) == [["/top"], ["/"]]


def test_writes_end_on_what_is_asked_for(make_tree: MakeTree) -> None:
    mounts = (ROOT, "0:60 overlay o /var rw,upperdir=/up", "7:0 ext4 /dev/loop0 /var/log", "0:50 tmpfs none /run")
    graph = Graph(make_tree(table(*mounts) | loop("7:0", "/var/log.img")))

    def ends(path: str, *devices: str) -> str | None:
        filesystem = graph.writes_to(path, devices)
        return filesystem.mountpoint if filesystem else None

    assert ends("/var/log/x", "8:1", "7:0") == "/var/log"
    assert ends("/var/log/x", "8:1") == ends("/var/lib", "8:1") == ends("/home", "8:1") == "/"
    assert ends("/run/x", "8:1") is ends("/var/log/x") is ends("/home", "7:0") is None


def test_only_the_kernel_s_tables_are_opened(make_tree: MakeTree, opened: list[str]) -> None:
    """Not an automount point, not a dead network mount, nor whatever else is mounted: only lines tell of them."""
    mounts = (
        ROOT,
        "0:70 autofs systemd-1 /auto",
        "0:71 nfs4 dead:/export /nfs",
        "7:0 ext4 /dev/loop0 /image",
        "0:30 btrfs /dev/sdb /nfs/pool",
        "0:60 overlay o /nfs/over rw,upperdir=/auto/up",
    )
    files = loop("7:0", "/nfs/x.img") | {"auto/file": "", "nfs/x.img": "", "nfs/pool/file": ""}
    tree = make_tree(table(*mounts) | files)
    opened.clear()
    plan_freeze(tree)
    assert opened
    assert {name.split("/")[0] for name in opened} <= {"proc", "sys"}


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
