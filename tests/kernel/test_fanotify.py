"""Who has to permit what others open, as this machine's kernel shows it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ballast.guest.linux.fanotify import Mark, parse_permission_marks
from ballast.guest.linux.mountinfo import find_mount, parse_mountinfo

SCANNER = Path(__file__).with_name("scanner.py")


@pytest.fixture
def scanned(tmp_path: Path) -> Iterator[tuple[int, str]]:
    """A process that watches one file that nobody opens, and the device of that file's file system."""
    file = tmp_path / "watched"
    file.touch()
    with subprocess.Popen([sys.executable, SCANNER, file, "inode"], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            if process.stdout.readline() != b"marked\n":
                pytest.skip("this kernel has no fanotify for us")
            mount = find_mount(parse_mountinfo(Path("/proc/self/mountinfo").read_text()), os.path.realpath(file))
            assert mount is not None
            yield process.pid, mount.device
        finally:
            process.kill()


def test_a_process_that_has_to_permit_is_found(scanned: tuple[int, str]) -> None:
    pid, device = scanned
    grep = ["grep", "-Hrs", "^fanotify ", f"/proc/{pid}/fdinfo"]
    shown = subprocess.run(grep, check=True, capture_output=True, text=True).stdout
    assert parse_permission_marks(shown) == [Mark(pid, None, device)]
