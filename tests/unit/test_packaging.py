"""What is written down twice, in the package and in the code, says the same."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

import pytest

import ballast
from ballast.guest.config import Config, read_config

ROOT = Path(__file__).parents[2]


def test_packages_have_the_version_of_the_code() -> None:
    first_line = (ROOT / "packaging/debian/changelog").read_text().partition("\n")[0]
    assert f"({ballast.__version__})" in first_line


def test_shipped_configuration_shows_every_key_with_its_default(tmp_path: Path) -> None:
    shipped = (ROOT / "packaging/agent.toml").read_text()
    everything_on = tmp_path / "agent.toml"
    everything_on.write_text(re.sub(r"^#(?=[a-z-]+ = )", "", shipped, flags=re.MULTILINE))
    assert (
        read_config(everything_on, tmp_path / "none")
        == Config()
        == read_config(ROOT / "packaging/agent.toml", tmp_path)
    )
    assert _keys(everything_on) == _keys_of_code()


def test_manual_shows_every_key_with_its_default() -> None:
    manual = (ROOT / "docs/man/ballast-agent.toml.5.scd").read_text()
    shipped = (ROOT / "packaging/agent.toml").read_text()
    defaults = re.findall(r"^#([a-z-]+) = (.*)$", shipped, flags=re.MULTILINE)
    assert [key for key, value in defaults if f"*{key}* = _{value}_" not in manual] == []


@pytest.mark.parametrize(
    ("unit", "answer"),
    [("ballast-balloon.service", "0"), ("ballast-guard.service", "0"), ("ballast-agent.service", "")],
)
def test_needrestart_leaves_alone_what_holds_a_freeze_or_the_balloon(unit: str, answer: str) -> None:
    # As needrestart reads the folder and then asks: the snippet sees its %nrconf.
    script = """our %nrconf = (override_rc => { qr(^dbus) => 0 }); my ($conf, $rc) = @ARGV;
        eval do { local (@ARGV, $/) = $conf; <> }; die $@ if $@;
        foreach my $re (keys %{$nrconf{override_rc}}) { print $nrconf{override_rc}->{$re} if $rc =~ /$re/ }"""
    conf = ROOT / "packaging/needrestart/ballast.conf"
    said = subprocess.run(["perl", "-we", script, conf, unit], capture_output=True, text=True, check=True)
    assert (said.stdout, said.stderr) == (answer, "")


def _keys(path: Path) -> set[tuple[str, str]]:
    return {(table, key) for table, values in tomllib.loads(path.read_text()).items() for key in values}


def _keys_of_code() -> set[tuple[str, str]]:
    config = Config()
    tables = (table for table in config.__slots__ if table != "writer")  # [writer.NAME] has what the writer knows
    return {(table, key.replace("_", "-")) for table in tables for key in getattr(config, table).__slots__}
