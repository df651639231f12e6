"""libvirt's machines, as far as no libvirt is needed: how they are named, what of theirs is kept beside their disks."""

import socket
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from ballast.host.machine import NotReclaimable
from ballast.host.storage.libvirt_machine import copy_state
from ballast.host.storage.libvirt_source import LibvirtSource
from ballast.host.storage.source import BackupFailed
from ballast.wire.errors import BadRequest


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("web1", "expected libvirt's"),
        ("/web1", "expected libvirt's"),
        ("qemu:///system/", "expected libvirt's"),
        ("qemu+ssh://root@far/system/web1", "own host, which is root@far"),
    ],
)
def test_a_target_that_is_none_is_refused(target: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match=reason):
        LibvirtSource(target, tmp_path)


async def test_without_the_library_the_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "libvirt", None)
    with pytest.raises(NotReclaimable, match="python3-libvirt"):
        await LibvirtSource("qemu:///system/web1", tmp_path).survey(None)


def machine(os: str = "", tpm: str = "") -> ElementTree.Element:
    return ElementTree.fromstring(f"<domain><uuid>u-1</uuid><os>{os}</os><devices>{tpm}</devices></domain>")


@pytest.mark.parametrize("form", ["<nvram>{}</nvram>", "<nvram type='file'><source file='{}'/></nvram>"])
def test_firmware_variables_are_kept(form: str, tmp_path: Path) -> None:
    (variables := tmp_path / "web1_VARS.fd").write_bytes(b"variables")
    (folder := tmp_path / "machine").mkdir()
    copy_state(machine(os=form.format(variables)), folder, None)
    assert (folder / "nvram").read_bytes() == b"variables"


def test_firmware_variables_that_are_no_file_fail_the_backup(tmp_path: Path) -> None:
    with pytest.raises(BackupFailed, match="in no file"):
        copy_state(machine(os="<nvram type='block'><source dev='/dev/x'/></nvram>"), tmp_path, None)


def test_what_a_tpm_holds_is_kept(tmp_path: Path) -> None:
    (state := tmp_path / "u-1" / "tpm2").mkdir(parents=True)
    (state / "tpm2-00.permall").write_bytes(b"state")
    (folder := tmp_path / "machine").mkdir()
    with socket.socket(socket.AF_UNIX) as control:
        control.bind(str(state / "ctrl"))
        tpm = f"<tpm><backend type='emulator'><source type='dir' path='{state.parent}'/></backend></tpm>"
        copy_state(machine(tpm=tpm), folder, None)
    assert [path.name for path in (folder / "tpm" / "tpm2").iterdir()] == ["tpm2-00.permall"]


def test_a_tpm_whose_state_is_elsewhere_is_told(tmp_path: Path) -> None:
    xml = machine(tpm=f"<tpm><backend type='emulator'><source type='dir' path='{tmp_path}/gone'/></backend></tpm>")
    with pytest.raises(BackupFailed, match="set tpm-state"):
        copy_state(xml, tmp_path, None)
    (kept := tmp_path / "kept").write_bytes(b"state")
    copy_state(xml, tmp_path, kept)
    assert (tmp_path / "tpm").read_bytes() == b"state"


def test_a_machine_with_neither_has_nothing_more_to_keep(tmp_path: Path) -> None:
    copy_state(machine(), tmp_path, None)
    assert list(tmp_path.iterdir()) == []
