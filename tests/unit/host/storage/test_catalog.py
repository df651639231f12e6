"""The catalogue: what is damaged is told and hides nothing; who may look, who may change, what may go."""

from __future__ import annotations

import hashlib
import json
import math
import os
import signal
import stat
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from ballast.host.storage.catalog import Catalog, StillNeeded
from ballast.host.storage.record import Damaged
from ballast.wire.errors import BadRequest, Busy, NoSuchId
from tests.unit.host.storage.backups import DISKS, NOW, begin, make

ID = "20261123T181500Z-1a2b3c"


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    return Catalog(tmp_path / "target", "web1")


def edit(path: Path, **changes: Any) -> None:
    """As a person would with an editor; ... takes a field out."""
    fields = json.loads(path.read_text()) | {name.replace("_", "-"): value for name, value in changes.items()}
    path.write_text(json.dumps({name: value for name, value in fields.items() if value is not ...}))


@pytest.mark.parametrize(
    ("file", "damage", "told"),
    [
        ("backup.json", Path.unlink, "backup.json: No such file"),
        ("backup.json", lambda path: path.write_bytes(b""), "backup.json: this is no JSON"),
        ("backup.json", lambda path: path.write_bytes(path.read_bytes()[:-40]), "backup.json: this is no JSON"),
        ("backup.json", lambda path: path.write_bytes(b"\xff\xfe"), "backup.json: this is no JSON"),
        ("backup.json", lambda path: path.write_text("[" * 100_000), "backup.json: this is no JSON"),
        ("backup.json", lambda path: path.write_text("[]"), "backup.json: expected an object"),
        ("backup.json", lambda path: edit(path, held=...), "backup.json: Parameter 'held' is missing"),
        ("backup.json", lambda path: edit(path, held="yes"), "type for 'held', expected: boolean"),
        ("backup.json", lambda path: edit(path, disks="vda"), "type for 'disks', expected: array"),
        ("backup.json", lambda path: edit(path, disks=["vda", "vdb"]), "vdb.json: No such file"),
        ("backup.json", lambda path: edit(path, disks=["../vda"]), "disks: '../vda' is not fit"),
        ("backup.json", lambda path: edit(path, disks=["backup"]), "disks: 'backup' is not fit"),
        ("backup.json", lambda path: edit(path, writers=[{}]), "'writers[0].name' is missing"),
        ("backup.json", lambda path: edit(path, id=ID), "backup.json: id: expected that of its folder"),
        ("backup.json", lambda path: edit(path, base=None), "backup.json: base: expected none in a full"),
        ("backup.json", lambda path: edit(path, base="2027"), "backup.json: base: expected an earlier"),
        ("backup.json", lambda path: edit(path, base="2025"), "vda.json: base: expected '../2025/vda.qcow2'"),
        ("backup.json", lambda path: edit(path, made="today"), "backup.json: made: expected a time"),
        ("backup.json", lambda path: edit(path, made="2026-11-23T18:15"), "backup.json: made: expected a time"),
        ("vda.json", Path.unlink, "vda.json: No such file"),
        ("vda.json", lambda path: edit(path, sha256=5), "vda.json: Invalid parameter type for 'sha256'"),
        ("vda.json", lambda path: edit(path, disk="vdb"), "vda.json: disk: expected 'vda', found 'vdb'"),
        ("vda.json", lambda path: edit(path, file="../x"), "vda.json: file: expected one beside it"),
        ("vda.json", lambda path: edit(path, base="/etc/passwd"), "vda.json: base: expected '../2026"),
        ("vda.qcow2", Path.unlink, "vda.qcow2: No such file"),
        ("vda.qcow2", lambda path: path.write_bytes(b"block"), "vda.qcow2: expected 6 bytes, found 5"),
    ],
)
def test_damage_is_told_and_hides_no_other(
    catalog: Catalog, file: str, damage: Callable[[Path], object], told: str
) -> None:
    full = make(catalog)
    hurt = make(catalog, full)
    above, other = make(catalog, hurt), make(catalog)
    damage(catalog.folder / hurt / file)
    backups, damaged = catalog.read()
    assert [backup.id for backup in backups] == [full, other]
    assert told in damaged.pop(hurt)
    # An increment on it would be worth nothing either.
    assert damaged == {above: f"it is based on {hurt}, which is missing or damaged"}
    with pytest.raises(Damaged, match="which is missing or damaged"):
        catalog.chain(above)
    # It may need the full one all the same, and a person may still save it.
    with pytest.raises(StillNeeded, match=hurt):
        catalog.remove(full)
    catalog.remove(above)
    catalog.remove(hurt)
    catalog.remove(full)
    assert [backup.id for backup in catalog.backups()] == [other]


def test_a_record_comes_back_as_it_was_and_what_a_later_version_adds_is_passed_over(catalog: Catalog) -> None:
    backup, images = begin(catalog, ID, None)
    made = catalog.commit(backup, images)
    assert made == replace(backup, images=images)
    for name in ("backup", *DISKS):
        edit(catalog.folder / ID / f"{name}.json", invented=[{}], images="none of ours")
    assert catalog.backups() == [made]
    assert catalog.find(ID) == catalog.last() == made


def test_it_can_be_read_without_us(catalog: Catalog) -> None:
    full = make(catalog, content=b"all")
    base = make(catalog, full, content=b"some")
    folder = catalog.folder / base
    told = json.loads((folder / "backup.json").read_text())
    assert (told["kind"], told["base"], told["chain"], told["held"]) == ("incremental", full, full, True)
    assert (told["frozen-ms"], told["why-full"], told["disks"]) == (41.5, None, ["vda", "data"])
    assert told["filesystems"] == [
        {"mountpoint": "/", "device": "/dev/vda1", "type": "ext4", "state": "thawed", "freeze-ms": 4.5}
    ]
    for disk in told["disks"]:
        image = json.loads((folder / f"{disk}.json").read_text())
        assert image["sha256"] == hashlib.sha256((folder / image["file"]).read_bytes()).hexdigest()
        assert (image["bytes"], image["image-bytes"], image["encrypted"]) == (1 << 30, 4, False)
        assert (folder / image["base"]).read_bytes() == b"all"


def test_nobody_else_can_look_in_whatever_the_umask(catalog: Catalog) -> None:
    before = os.umask(0)
    try:
        make(catalog)
        with catalog.lock():
            pass
    finally:
        os.umask(before)
    for path in [catalog.folder.parent, *catalog.folder.parent.rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


@pytest.mark.parametrize(
    ("vm", "folder"),
    [
        ("web1", "web1"),
        ("vsock:42", "vsock%3A42"),
        ("unix:/run/x", "unix%3A%2Frun%2Fx"),
        ("unix%3A%2Frun%2Fx", "unix%253A%252Frun%252Fx"),
        ("Düsen 1", "D%C3%BCsen%201"),
        ("a\udcff\n", "a%FF%0A"),
        (".", "%2E"),
        ("..", "%2E."),
        (".hidden", "%2Ehidden"),
        ("a.b-c_d~e", "a.b-c_d~e"),
    ],
)
def test_every_name_has_a_folder_of_its_own(vm: str, folder: str) -> None:
    assert Catalog(Path("/srv"), vm).folder == Path("/srv", folder)


@pytest.mark.parametrize("vm", ["", "a" * 256, "/" * 86])
def test_a_name_that_no_folder_can_have_is_refused(vm: str) -> None:
    with pytest.raises(BadRequest, match="no folder for backups"):
        Catalog(Path("/srv"), vm)


@pytest.mark.parametrize("id_", ["", "..", "x/../y", "lock", f"{ID}.partial", f"{ID}\n"])
def test_what_is_no_id_leads_nowhere(catalog: Catalog, id_: str) -> None:
    for use in (catalog.begin, catalog.discard, catalog.remove, catalog.chain):
        with pytest.raises(NoSuchId):
            use(id_)


def test_ids_rise_though_the_clock_falls(catalog: Catalog) -> None:
    ids = [make(catalog), make(catalog)]
    catalog.begin(catalog.new_id(NOW + timedelta(hours=1)))
    ids += [*catalog.partials(), catalog.new_id(NOW - timedelta(days=1))]
    assert ids == sorted(ids)
    assert [id_[:16] for id_ in ids] == [f"20261123T{time}Z" for time in ("181500", "181501", "191500", "191501")]


def test_an_empty_catalogue_has_nothing_and_is_not_made_by_looking(catalog: Catalog) -> None:
    assert catalog.read() == ([], {})
    assert catalog.last() is None
    assert catalog.partials() == catalog.leftovers() == catalog.sweep() == []
    assert not catalog.folder.exists()


def test_what_is_none_of_ours_is_passed_over(catalog: Catalog) -> None:
    full = make(catalog)
    (catalog.folder / "README").write_text("the web server's")
    (catalog.folder / ".snapshot").mkdir()
    (catalog.folder / f"{full}-copy").mkdir()
    backups, damaged = catalog.read()
    assert [backup.id for backup in backups] == [full]
    assert list(damaged) == [f"{full}-copy"]


def test_a_chain_goes_from_the_full_one_and_only_its_end_can_go(catalog: Catalog) -> None:
    full = make(catalog)
    middle = make(catalog, full)
    end = make(catalog, middle)
    assert [backup.id for backup in catalog.chain(end)] == [full, middle, end]
    assert [backup.chain for backup in catalog.chain(end)] == [full] * 3
    assert [backup.id for backup in catalog.children(full)] == [middle]
    with pytest.raises(StillNeeded, match=f"{full} stays: {middle} cannot"):
        catalog.remove(full)
    catalog.remove(end)
    catalog.remove(middle)
    assert [backup.id for backup in catalog.backups()] == [full]
    with pytest.raises(NoSuchId):
        catalog.remove(end)


def test_what_is_merged_takes_the_old_ones_place_and_begins_a_chain(catalog: Catalog) -> None:
    full = make(catalog)
    middle = make(catalog, full)
    end = make(catalog, middle)
    catalog.replace(*begin(catalog, middle, None, b"all of it"))
    assert [backup.chain for backup in catalog.backups()] == [full, middle, middle]
    assert [backup.id for backup in catalog.chain(end)] == [middle, end]
    assert (catalog.folder / middle / "vda.qcow2").read_bytes() == b"all of it"
    assert catalog.partials() == []
    catalog.remove(full)


def test_what_would_be_damaged_is_not_committed(catalog: Catalog) -> None:
    backup, images = begin(catalog, ID, None)
    with pytest.raises(Damaged, match=r"data\.json: No such file"):
        catalog.commit(backup, images[:1])
    with pytest.raises(Damaged, match=r"backup\.json: .*not JSON compliant"):
        catalog.commit(replace(backup, frozen_ms=math.inf), images)
    assert (catalog.backups(), catalog.partials()) == ([], [ID])
    catalog.discard(ID)
    catalog.discard(ID)
    assert catalog.partials() == []


def test_only_one_at_a_time_changes_it_and_the_other_is_told_who(catalog: Catalog) -> None:
    with catalog.lock(), pytest.raises(Busy, match=rf"process {os.getpid()} on .*backups of web1"), catalog.lock():
        pass
    with catalog.lock():
        pass


def test_the_lock_of_one_who_was_killed_is_free(catalog: Catalog) -> None:
    reader, writer = os.pipe()
    if not (child := os.fork()):
        try:
            with catalog.lock():
                os.write(writer, b"!")
                time.sleep(60)
        finally:
            os._exit(1)
    os.read(reader, 1)
    with pytest.raises(Busy, match=f"process {child} on "), catalog.lock():
        pass
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with catalog.lock():
        pass
    os.close(reader)
    os.close(writer)


def test_all_of_it_is_on_the_disk_before_it_has_its_name(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    backup, images = begin(catalog, ID, None)
    fsync, rename = os.fsync, os.rename
    synced: list[Path] = []

    def note_fsync(fd: int) -> None:
        fsync(fd)
        synced.append(Path(f"/proc/self/fd/{fd}").readlink())

    def note_rename(one: Path, other: Path) -> None:
        assert set(synced) == {one, *one.rglob("*")}
        synced.clear()
        rename(one, other)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "rename", note_rename)
    catalog.commit(backup, images)
    assert synced == [catalog.folder]


def test_what_is_not_there_is_not_replaced(catalog: Catalog) -> None:
    with pytest.raises(FileNotFoundError, match="renameat2: No such file"):
        catalog.replace(*begin(catalog, ID, None))
