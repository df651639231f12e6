"""The table of mounts: bad lines first; names may hold whatever a user likes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ballast.guest.linux.mountinfo import Mount, parse_mountinfo
from ballast.guest.linux.tree import Tree

LINE = r"36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw,errors=continue"
MOUNT = Mount(
    36,
    35,
    "98:0",
    "/mnt1",
    "/mnt2",
    frozenset({"rw", "noatime"}),
    "ext3",
    "/dev/root",
    frozenset({"rw", "errors=continue"}),
)


@pytest.mark.parametrize(
    "line",
    [
        "garbage",
        "36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 ext3 /dev/root rw",
        "36 35 98:0 /mnt1 /mnt2 - ext3 /dev/root rw",
        "36 35 98:0 /mnt1 /mnt2 rw - ext3 /dev/root",
        "a 35 98:0 /mnt1 /mnt2 rw - ext3 /dev/root rw",
        "36  98:0 /mnt1 /mnt2 rw - ext3 /dev/root rw",
    ],
)
def test_a_line_that_cannot_be_read_is_named(line: str) -> None:
    with pytest.raises(ValueError, match=f"'{line}'"):
        parse_mountinfo(f"{LINE}\n{line}\n")


def test_the_manual_s_own_line() -> None:
    assert parse_mountinfo(LINE) == parse_mountinfo(LINE + "\n") == [MOUNT]
    assert parse_mountinfo("") == []


@pytest.mark.parametrize("optional", ["", "shared:2 ", "shared:2 master:1 propagate_from:3 unbindable later:x "])
def test_any_number_of_optional_fields(optional: str) -> None:
    assert parse_mountinfo(LINE.replace("master:1 ", optional)) == [MOUNT]


def test_fields_of_later_kernels_are_passed_over() -> None:
    assert parse_mountinfo(LINE + " later") == [MOUNT]


def test_an_empty_source_is_no_error() -> None:
    (mount,) = parse_mountinfo(LINE.replace("/dev/root", ""))
    assert mount.source == ""


@pytest.mark.parametrize(
    ("written", "name"),
    [
        (r"/a\040b", "/a b"),
        (r"/a\134040b", r"/a\040b"),
        (r"/tab\011nl\012", "/tab\tnl\n"),
        ("/-", "/-"),
        ("/a\N{LINE SEPARATOR}b\x0c\x1e\x85", "/a\N{LINE SEPARATOR}b\x0c\x1e\x85"),
        ("/x\udce9", "/x\udce9"),
    ],
)
def test_names_are_the_user_s(written: str, name: str) -> None:
    """Whoever may mount with fusermount chooses a mount point's name, and must not be able to hide the table."""
    first, second = parse_mountinfo(f"{LINE.replace('/mnt2', written)}\n{LINE}\n")
    assert first.mountpoint == name
    assert second == MOUNT


@given(st.text(st.characters(exclude_characters="\0")))
def test_any_name_survives_the_kernel_s_escapes(name: str) -> None:
    written = "".join(f"\\{ord(char):03o}" if char in " \t\n\\" else char for char in name)
    (mount,) = parse_mountinfo(LINE.replace("mnt2", written))
    assert mount.mountpoint == f"/{name}"


def test_recorded(recorded: Tree) -> None:
    mounts = {mount.mountpoint: mount for mount in parse_mountinfo(recorded.read("proc/1/mountinfo"))}
    assert mounts["/"].type == "ext4"
    assert mounts["/mnt/bind"].device == mounts["/mnt/data0"].device
    assert mounts["/mnt/with blank"].device == mounts["/mnt/loop"].device
    assert (mounts["/mnt/volume"].device, mounts["/mnt/volume"].root) == (mounts["/mnt/data2"].device, "/volume")
    assert "ro" in mounts["/mnt/read-only"].super_options
