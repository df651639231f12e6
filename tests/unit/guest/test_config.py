"""Configuration: what is wrong stops the start, and says where."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ballast.guest.config import Agent, Config, ConfigError, Limits, Policy, Transports, read_config


@pytest.mark.parametrize(
    ("text", "key", "reason"),
    [
        (
            "[agnet]",
            "agnet",
            "unknown table, expected one of agent, transports, dbus, policy, limits, memory, pressure",
        ),
        ("log-level = 'info'", "log-level", "unknown table"),
        ("agent = 5", "agent", "expected a table"),
        ("[[agent]]", "agent", "expected a table"),
        ("[agent]\nlog_level = 'info'", "agent.log_level", "unknown key, expected one of log-level"),
        ("[agent]\nlog-level = 'loud'", "agent.log-level", "expected one of debug, info, warning, error, found 'loud'"),
        ("[agent]\nlog-level = ['info']", "agent.log-level", "expected one of"),
        ("[memory]\nonline = 1", "memory.online", "expected one of agent, kernel, off, found 1"),
        ("[transports]\nvsock = 'yes'", "transports.vsock", "expected true or false, found 'yes'"),
        ("[transports]\nunix = false", "transports.unix", "expected a string, found False"),
        ("[limits]\npeers = true", "limits.peers", "expected a whole number, found True"),
        ("[limits]\npeers = 8.0", "limits.peers", "expected a whole number, found 8.0"),
        ("[limits]\npeers = 0", "limits.peers", "expected 1 to 512, found 0"),
        ("[quiesce]\nlease-ms = 600_001", "quiesce.lease-ms", "expected 1000 to 600000, found 600001"),
        ("[quiesce]\nlease-ms = '2m'", "quiesce.lease-ms", "expected a whole number, found '2m'"),
        ("[pressure]\nease-percent = 0", "pressure.ease-percent", "expected 1 to 100, found 0"),
        ("[pressure]\nwindow-ms = 499", "pressure.window-ms", "expected 500 to 10000, found 499"),
        ("[pressure]\ncgroups = ['../etc']", "pressure.cgroups", "expected control groups such as system.slice/"),
        ("[pressure]\ncgroups = ['a/./b']", "pressure.cgroups", "expected control groups"),
        ("[pressure]\ncgroups = ['/a']", "pressure.cgroups", "expected control groups"),
        ("[pressure]\ncgroups = ['a/']", "pressure.cgroups", "expected control groups"),
        ("[pressure]\ncgroups = ['a', '']", "pressure.cgroups", "expected control groups"),
        ("[pressure]\ncgroups = ['ballast.slice/x']", "pressure.cgroups", "expected control groups"),
        ("[policy]\nallow = 'guest-ping'", "policy.allow", "expected a list of strings, found 'guest-ping'"),
        ("[policy]\nblock = ['guest-ping', 5]", "policy.block", "expected a list of strings, found 5"),
    ],
)
def test_wrong_configuration_names_file_key_and_reason(tmp_path: Path, text: str, key: str, reason: str) -> None:
    path = tmp_path / "agent.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=f"^{re.escape(f'{path}: {key}: {reason}')}"):
        read_config(path, tmp_path / "agent.d")


@pytest.mark.parametrize("content", [b"[agent", b"a = 1\na = 2", b"[agent]\nlog-level = '\xff'"])
def test_what_is_no_toml_names_the_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "agent.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=f"^{re.escape(str(path))}: "):
        read_config(path, tmp_path / "agent.d")


def test_without_any_file_all_is_default(tmp_path: Path) -> None:
    assert read_config(tmp_path / "agent.toml", tmp_path / "agent.d") == Config()


def test_a_file_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=re.escape(str(tmp_path))):
        read_config(tmp_path, tmp_path / "agent.d")


def test_drop_ins_win_key_by_key_in_order_of_their_names(tmp_path: Path) -> None:
    path, drop_ins = tmp_path / "agent.toml", tmp_path / "agent.d"
    drop_ins.mkdir()
    path.write_text("[agent]\nlog-level = 'debug'\n[limits]\npeers = 1\ntriggers = 1\n[policy]\nblock = ['a', 'b']")
    (drop_ins / "20.toml").write_text("[limits]\npeers = 20")
    (drop_ins / "10.toml").write_text("[limits]\npeers = 10\nqueue-bytes = 20_000\n[policy]\nblock = ['c']")
    (drop_ins / "30.conf").write_text("not ours, and no TOML")
    assert read_config(path, drop_ins) == Config(
        agent=Agent(log_level="debug"),
        limits=Limits(peers=20, triggers=1, queue_bytes=20_000),
        policy=Policy(block=("c",)),
    )


def test_a_wrong_drop_in_is_named(tmp_path: Path) -> None:
    (tmp_path / "agent.toml").write_text("[limits]\npeers = 1")
    (tmp_path / "bad.toml").write_text("[limits]\npeers = -1")
    with pytest.raises(ConfigError, match=r"bad\.toml: limits\.peers"):
        read_config(tmp_path / "agent.toml", tmp_path)


@pytest.mark.parametrize(
    ("value", "online"),
    [("true", "agent"), ("false", "off"), ("'agent'", "agent"), ("'kernel'", "kernel"), ("'off'", "off")],
)
def test_memory_online_was_true_or_false_once(tmp_path: Path, value: str, online: str) -> None:
    path = tmp_path / "agent.toml"
    path.write_text(f"[memory]\nonline = {value}")
    assert read_config(path, tmp_path / "none").memory.online == online


def test_an_empty_name_switches_a_transport_off(tmp_path: Path) -> None:
    path = tmp_path / "agent.toml"
    path.write_text("[transports]\nvsock = false\nvirtio-serial = ''\nunix = ''")
    assert read_config(path, tmp_path / "none").transports == Transports(vsock=False, virtio_serial="", unix="")
