"""fanotify marks, by lines as the kernel and grep write them."""

from __future__ import annotations

import pytest

from ballast.guest.linux.fanotify import Mark, parse_permission_marks

FD = "/proc/812/fdinfo/5:fanotify "


@pytest.mark.parametrize("text", [f"{FD}sdev:zz mask:10000\n", f"{FD}sdev:800001 mask:maybe\n"])
def test_a_number_that_is_none_is_an_error(text: str) -> None:
    with pytest.raises(ValueError, match="invalid literal"):
        parse_permission_marks(text)


@pytest.mark.parametrize(
    ("line", "marks"),
    [
        ("", []),
        ("grep: /proc/9/fdinfo: No such file or directory", []),
        ("/proc/812/fdinfo/6:inotify wd:1 ino:2a sdev:800001 mask:10000", []),
        (f"{FD}flags:4 event-flags:0", []),
        (f"{FD}mnt_id:1d mflags:0 mask:3b ignored_mask:0", []),
        (f"{FD}mnt_id:1d mflags:0 mask:10000 ignored_mask:0", [Mark(812, 29, None)]),
        (f"{FD}sdev:fe00010 mflags:0 mask:20001 ignored_mask:40000000", [Mark(812, None, "254:16")]),
        (
            f"{FD}ino:2a sdev:800001 mflags:0 mask:40000 ignored_mask:0 fhandle-bytes:8 fhandle-type:1 f_handle:2a00",
            [Mark(812, None, "8:1")],
        ),
        (f"{FD}mnt_ns:7 mflags:0 mask:100000 of-later:x", [Mark(812, None, None)]),
    ],
)
def test_only_marks_that_wait_for_an_answer_count(line: str, marks: list[Mark]) -> None:
    assert parse_permission_marks(f"all\n{line}\n") == marks
