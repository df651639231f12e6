"""Which programs are writers, and which of them are started at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from ballast.guest.quiesce.writer_files import find_writers, what_is_missing


@pytest.mark.parametrize(
    ("needs", "config", "missing"),
    [
        ("", {}, None),
        ("# ballast-needs: {root}/there", {}, None),
        ("# ballast-needs: {root}/none", {}, "no {root}/none"),
        ("# ballast-needs: {root}/none {root}/th*", {}, None),
        ("# ballast-needs: {root}/none/* {root}/no*", {}, "no {root}/none/* or {root}/no*"),
        ("# ballast-needs: {root}/there!stock", {}, "no {root}/there!stock"),
        ("# ballast-needs: {root}/th*!custom", {}, None),
        ("# ballast-needs: comm=none {root}/none", {}, "no process none or {root}/none"),
        (f"# ballast-needs: comm=none comm={Path('/proc/self/comm').read_text().strip()}", {}, None),
        ("# ballast-needs: {root}/none!stock", {}, "no {root}/none!stock"),
        ("# ballast-needs: [writer.shop]", {}, "no [writer.shop]"),
        ("# ballast-needs: [writer.shop]", {"level": "system"}, None),
        ("# ballast-needs: [writer.other]", {"level": "system"}, "no [writer.other]"),
    ],
)
def test_a_writer_is_started_only_where_it_has_what_it_needs(
    tmp_path: Path, needs: str, config: dict[str, str], missing: str | None
) -> None:
    tmp_path.joinpath("there").write_text("for stock in shop\n")
    program = tmp_path / "shop"
    program.write_text(f"#!/bin/sh\n{needs.format(root=tmp_path)}\n")
    assert what_is_missing(program, config) == (missing and missing.format(root=tmp_path))


def test_the_administrators_folder_goes_before_ours(tmp_path: Path) -> None:
    etc, usr = tmp_path / "etc", tmp_path / "usr"
    for file in (usr / "shop", usr / "off", usr / "stays", etc / "shop", etc / "a.bak"):
        file.parent.mkdir(exist_ok=True)
        file.touch()
    etc.joinpath("off").symlink_to("/dev/null")
    assert find_writers((etc, usr, tmp_path / "none")) == [etc / "shop", usr / "stays"]
