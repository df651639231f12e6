"""Whoever is killed at whatever call leaves a whole backup or none, and nothing that is not found and swept."""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import shutil
import signal
import struct
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from ballast.host import linux
from ballast.host.storage.catalog import Catalog
from ballast.host.storage.record import Image
from tests.unit.host.storage.backups import NOW, begin, make

CHANGES = {"mkdir", "open", "write", "rename", "unlink", "rmdir"}
RENAMEAT2 = {"x86_64": 316, "aarch64": 276}

Act = Callable[[Catalog, str, str], None]


def forbid_exchange() -> None:
    """Have this process's kernel answer renameat2(2) as on NFS and SMB. linux/seccomp.h and filter.h."""
    number = RENAMEAT2[platform.machine()]
    load, jump_if_equal, answer = 0x20, 0x15, 0x06
    allow, error = 0x7FFF0000, 0x00050000
    steps = [
        (load, 0, 0, 0),
        (jump_if_equal, 0, 1, number),
        (answer, 0, 0, error | errno.EINVAL),
        (answer, 0, 0, allow),
    ]
    program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    pointer = struct.pack("HP", len(steps), ctypes.addressof(program))
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    no_new_privileges, seccomp, filter_mode = 38, 22, 2
    assert prctl(no_new_privileges, 1, 0, 0, 0) == 0
    assert prctl(seccomp, filter_mode, pointer, 0, 0) == 0


def killed_at(point: int, act: Callable[[], object]) -> bool:
    """Act in a child that is killed after its Nth call that changes something; False if there are fewer."""

    def count(frame: FrameType, event: str, called: Any) -> None:
        nonlocal point
        # A call by ctypes is no event; the return from the function that does nothing else is one.
        is_exchange = event == "return" and frame.f_code is linux.exchange.__code__
        if is_exchange or (event == "c_return" and called.__name__ in CHANGES):
            point -= 1
            if not point:
                os.kill(os.getpid(), signal.SIGKILL)

    if not (child := os.fork()):
        try:
            sys.setprofile(count)
            act()
            os._exit(0)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.waitstatus_to_exitcode(status) == 0
    return os.WIFSIGNALED(status)


def contents(catalog: Catalog) -> dict[str, bytes]:
    """What a restore would read of each backup there is; all that are listed must be whole."""
    backups = catalog.backups()
    for backup in backups:
        for image in backup.images:
            path = catalog.folder / backup.id / image.file
            again = Image.of(path, disk=image.disk, bytes_=image.bytes, base=image.base, encrypted=image.encrypted)
            assert again == image
        assert (catalog.folder / backup.id / "machine" / "command-line.json").read_text() == "[]"
    return {backup.id: (catalog.folder / backup.id / "vda.qcow2").read_bytes() for backup in backups}


def commit(catalog: Catalog, id_: str, full: str) -> None:
    catalog.commit(*begin(catalog, id_, full, b"new"))


def rewrite(catalog: Catalog, id_: str, _full: str) -> None:
    catalog.replace(*begin(catalog, id_, None, b"new"))


def rewrite_on_nfs(catalog: Catalog, id_: str, full: str) -> None:
    forbid_exchange()
    rewrite(catalog, id_, full)


def remove(catalog: Catalog, id_: str, _full: str) -> None:
    catalog.remove(id_)


def killed_everywhere(folder: Path, act: Act, before: bytes | None) -> Iterator[tuple[bytes | None, bytes | None]]:
    """What is in the place of an increment when somebody was killed at an act upon it, and what when that is swept."""
    first = Catalog(folder / "first", "web1")
    full, id_ = make(first), first.new_id(NOW)
    if before:
        first.commit(*begin(first, id_, full, before))
    is_killed, point = True, 0
    while is_killed:
        point += 1
        shutil.copytree(folder / "first", folder / str(point))
        catalog = Catalog(folder / str(point), "web1")
        is_killed = killed_at(point, partial(act, catalog, id_, full))
        left, is_tidy = contents(catalog), catalog.partials() == catalog.leftovers() == []
        assert bool(catalog.sweep()) != is_tidy
        swept = contents(catalog)
        assert catalog.read()[1] == {}
        assert {path.name for path in catalog.folder.iterdir()} == set(swept) >= {full}
        yield left.get(id_), swept.get(id_)


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("act", "before", "after"), [(commit, None, b"new"), (rewrite, b"old", b"new"), (remove, b"old", None)]
)
def test_whoever_is_killed_leaves_a_whole_backup_or_none(
    tmp_path: Path, act: Act, before: bytes | None, after: bytes | None
) -> None:
    found = []
    for left, swept in killed_everywhere(tmp_path, act, before):
        assert left == swept
        found.append(left)
    # First it is as it was, and from one moment on as it shall be.
    assert found == sorted(found, key=lambda content: content == after)
    assert (found[0], found[-1]) == (before, after)


@pytest.mark.timeout(120)
@pytest.mark.skipif(platform.machine() not in RENAMEAT2, reason="the number of renameat2 is not known here")
def test_where_folders_cannot_be_exchanged_the_old_one_is_put_back(tmp_path: Path) -> None:
    found = list(killed_everywhere(tmp_path, rewrite_on_nfs, b"old"))
    assert (None, b"old") in found
    assert [swept for _, swept in found] == sorted((swept for _, swept in found), key=lambda content: content == b"new")
    assert (found[0], found[-1]) == ((b"old", b"old"), (b"new", b"new"))
