"""The command line. The daemon itself is started in guests only: it would bring this machine's memory online."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ballast import __version__
from ballast.guest.daemon import EXIT_CONFIG, main


def test_a_wrong_configuration_is_said_and_ends_the_start(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "agent.d").mkdir()
    (tmp_path / "agent.d/50.toml").write_text("[limits]\npeers = 'many'")
    assert main(["--config", str(tmp_path / "agent.toml")]) == EXIT_CONFIG == 78
    expected = f"ballastd: {tmp_path}/agent.d/50.toml: limits.peers: expected a whole number, found 'many'\n"
    assert capsys.readouterr().err == expected


def test_check_reads_the_configuration_and_leaves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "agent.toml"
    path.write_text("[memory]\nonline = false")
    assert main(["--check", "--config", str(path)]) == 0
    path.write_text("[memory]\nonline = no")
    assert main(["--check", "--config", str(path)]) == EXIT_CONFIG
    assert str(path) in capsys.readouterr().err


def test_it_must_be_root(capsys: pytest.CaptureFixture[str]) -> None:
    was = os.geteuid()
    if was == 0:
        os.seteuid(65534)
    try:
        assert main(["--config", "/no/such/file"]) == 1
    finally:
        os.seteuid(was)
    assert "must run as root" in capsys.readouterr().err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"ballastd {__version__}\n"
