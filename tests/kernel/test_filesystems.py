"""File systems in backups, through the real libguestfs: they are clean when a freeze was right, and damage is found."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import pytest

from ballast.host.cli import main
from ballast.host.storage.catalog import Catalog, Image
from tests.kernel.conftest import MakeLoopFs
from tests.unit.host.storage.backups import record

VM = "web1"
MIB = 1 << 20
# As sfdisk has it: the first holds a file system, the other nothing that is checked.
PARTITIONED, PARTITION_START = "2048,131072\n,,S\n", 2048 * 512


def run(*argv: str | Path) -> None:
    subprocess.run([str(word) for word in argv], check=True, capture_output=True)


def frozen_copy(make_loop_fs: MakeLoopFs, kind: str, copy: Path) -> Path:
    """What a disk holds that was frozen in the midst of work, with a file that is deleted and still open."""
    filesystem = make_loop_fs(kind)
    with (filesystem.path / "deleted").open("wb") as deleted:
        deleted.write(os.urandom(MIB))
        (filesystem.path / "deleted").unlink()
        for number in range(20):
            (filesystem.path / f"file{number}").write_bytes(os.urandom(20000))
        run("fsfreeze", "--freeze", filesystem.path)
        run("cp", "--sparse=always", filesystem.image, copy)
        run("fsfreeze", "--unfreeze", filesystem.path)
    return copy


def partitioned(filesystem: Path, disk: Path) -> Path:
    """A disk with a file system in its first partition."""
    with disk.open("wb") as file:
        file.truncate(96 * MIB)
        subprocess.run(["sfdisk", "-q", disk], input=PARTITIONED.encode(), check=True)
        file.seek(PARTITION_START)
        file.write(filesystem.read_bytes())
    return disk


def damaged(disk: Path) -> Path:
    """A file system of which one file's inode was overwritten."""
    with disk.open("wb") as file:
        file.truncate(32 * MIB)
    run("mkfs.ext4", "-q", disk)
    run("debugfs", "-w", "-R", "mkdir folder", disk)
    run("debugfs", "-w", "-R", "clri folder", disk)
    return disk


def catalogued(place: Path, disks: dict[str, Path]) -> Catalog:
    """A backup of these disks, and an increment on it in which nothing changed."""
    catalog = Catalog(place, VM)
    base: str | None = None
    for _ in range(2):
        id_ = catalog.new_id(datetime.now(UTC))
        folder, images = catalog.begin(id_), []
        for name, disk in disks.items():
            path, backing = folder / f"{name}.qcow2", f"../{base}/{name}.qcow2" if base else None
            if backing:
                run(
                    "qemu-img", "create", "-q", "-f", "qcow2", "-u", "-b", backing, "-F", "qcow2", path, f"{size(disk)}"
                )
            else:
                run("qemu-img", "convert", "-O", "qcow2", disk, path)
            images.append(Image.of(path, disk=name, bytes_=size(disk), base=backing, encrypted=False))
        catalog.commit(dataclasses.replace(record(catalog, id_, base), disks=list(disks)), images)
        base = id_
    return catalog


def size(disk: Path) -> int:
    return disk.stat().st_size


def test_frozen_file_systems_are_clean_and_damage_is_found(
    make_loop_fs: MakeLoopFs, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ext4, xfs = (frozen_copy(make_loop_fs, kind, tmp_path / kind) for kind in ("ext4", "xfs"))
    disks = {"root": partitioned(ext4, tmp_path / "disk"), "logs": xfs, "old": damaged(tmp_path / "old")}
    catalog = catalogued(tmp_path / "backups", disks)
    before = {path: path.read_bytes() for path in catalog.folder.rglob("*.qcow2")}
    monkeypatch.setenv("LIBGUESTFS_BACKEND_SETTINGS", "force_tcg")  # as all our guests, wherever KVM is half there
    (config := tmp_path / "host.toml").write_text(f'[vm.{VM}]\nagent = "unix:/nowhere"\n')
    place = ["--config", str(config), "--target", str(catalog.folder.parent)]
    status = main(["backup", "verify", VM, *place, "--filesystems", "--json"])
    out, said = capsys.readouterr()
    assert out, said
    told = json.loads(out)
    found = {(one["disk"], one["partition"], one["type"]): one["wrong"] for one in told["filesystems"]}
    assert status == 1
    assert found["root", 1, "ext4"] is None
    assert found["logs", None, "xfs"] is None
    assert "e2fsck" in found["old", None, "ext4"]
    assert [said.split(":")[0] for said in told["wrong"]] == ["old (ext4)"]
    assert before == {path: path.read_bytes() for path in before}
