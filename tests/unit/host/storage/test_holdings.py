"""What a target holds, and how a person and a program are told."""

import json
from pathlib import Path

import pytest

from ballast.host.cli import main
from ballast.host.storage.catalog import Catalog
from ballast.host.storage.holdings import read_holdings
from ballast.host.storage.record import BACKUP_FILE
from tests.unit.host.storage.backups import make


def test_every_machine_with_backups_is_there_by_its_own_name(tmp_path: Path) -> None:
    made = [make(Catalog(tmp_path, "web1"))]
    made.append(make(Catalog(tmp_path, "web1"), base=made[0]))
    make(Catalog(tmp_path, "vsock:42"))
    (tmp_path / "lost+found").mkdir()
    first, second = read_holdings(tmp_path)
    assert (first.vm, first.backups, first.damaged) == ("vsock:42", 1, 0)
    assert (second.vm, second.backups, second.bytes) == ("web1", 2, 4 * len(b"blocks"))
    assert second.last is not None
    assert second.last.id == made[1]
    assert read_holdings(tmp_path / "absent") == []


@pytest.mark.parametrize(("is_damaged", "status"), [(False, 0), (True, 5)])
def test_they_are_listed_without_a_machine(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], is_damaged: bool, status: int
) -> None:
    id_ = make(Catalog(tmp_path, "web1"))
    if is_damaged:
        (tmp_path / "web1" / id_ / BACKUP_FILE).write_text("{")
    words = ["backup", "list", "--target", str(tmp_path), "--config", str(tmp_path / "absent")]
    assert main(words) == status
    assert ("1 damaged" if is_damaged else "2026-11-23") in capsys.readouterr().out
    assert main([*words, "--json"]) == status
    (told,) = json.loads(capsys.readouterr().out)["machines"]
    assert (told["vm"], told["damaged"], told["last"] and told["last"]["id"]) == (
        "web1",
        int(is_damaged),
        None if is_damaged else id_,
    )
