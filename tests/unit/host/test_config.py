"""host.toml: what is refused, with file, key and reason; and the way from a target to an agent."""

from __future__ import annotations

from pathlib import Path

import pytest

from ballast.host.config import Backups, ConfigError, Route, Vm, find_route, read_backups, read_config, read_token


def write(path: Path, text: str, mode: int = 0o600) -> Path:
    """A file with that content and mode."""
    path.write_text(text)
    path.chmod(mode)
    return path


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[vm.web1", "Expected ']'"),
        ("[host]\n", "host: unknown key, expected [vm.NAME]"),
        ("vm = 5\n", "vm: expected tables: [vm.NAME]"),
        ("[vm]\nweb1 = 5\n", "vm.web1: expected a table, found 5"),
        (
            '[vm.web1]\nagnet = "x"\n',
            "vm.web1.agnet: unknown key, expected one of agent, qmp, libvirt, token",
        ),
        ('[vm.web1]\ntoken_file = "x"\n', "vm.web1.token_file: unknown key"),
        ("[vm.web1]\nagent = 42\n", "vm.web1.agent: expected a string, found 42"),
        ('[vm.web1]\nqmp = ""\n', "vm.web1.qmp: expected a string, found ''"),
        ('[vm.web1]\nsafe-vhost-user = "fs0"\n', "vm.web1.safe-vhost-user: expected a list of strings, found 'fs0'"),
        ("[vm.web1]\nsafe-vhost-user = [1]\n", "vm.web1.safe-vhost-user: expected a list of strings, found [1]"),
        ('[vm.web1]\nagent = "vsock:x"\n', "vm.web1.agent: vsock:x: expected vsock:CID[:PORT]"),
        ('[vm."vsock:1"]\nagent = "vsock:1"\n', "vm.vsock:1: a name that begins like a connect string"),
        ("vm = { a = 1, a = 2 }\n", "line 1"),
    ],
)
def test_what_is_wrong_is_told_with_file_key_and_reason(tmp_path: Path, text: str, problem: str) -> None:
    path = write(tmp_path / "host.toml", text)
    with pytest.raises(ConfigError) as caught:
        read_config(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert problem in str(caught.value)


def test_virtual_machines_are_read(tmp_path: Path) -> None:
    path = write(
        tmp_path / "host.toml",
        '[vm.web1]\nagent = "vsock:42"\nqmp = "unix:/q"\ntoken-file = "/t"\nsafe-vhost-user = ["a", "b"]\n'
        '[vm.db1]\nlibvirt = "qemu:///system/db1"\n',
    )
    assert read_config(path) == {
        "web1": Vm("vsock:42", "unix:/q", None, Path("/t"), ("a", "b")),
        "db1": Vm(libvirt="qemu:///system/db1"),
    }


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("backup = 5\n", "backup: expected tables"),
        ('[backup]\nplace = "/x"\n', "backup.place: unknown key, expected one of target, fleece,"),
        ('[backup]\ntarget = "backups"\n', "backup.target: expected an absolute path, found 'backups'"),
        ("[backup]\nfleece = 1\n", "backup.fleece: expected an absolute path, found 1"),
        ("[backup]\nfleece-timeout-s = 0\n", "backup.fleece-timeout-s: expected a number from 1 to 60, found 0"),
        ("[backup]\nbackups-at-once = true\n", "backup.backups-at-once: expected a number from 1 to 64, found True"),
        ('[backup]\nif-not-held = "hope"\n', "backup.if-not-held: expected one of retry, discard, keep, found 'hope'"),
    ],
)
def test_what_is_wrong_with_backups_is_told(tmp_path: Path, text: str, problem: str) -> None:
    path = write(tmp_path / "host.toml", text)
    with pytest.raises(ConfigError) as caught:
        read_backups(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert problem in str(caught.value)


def test_what_there_is_to_know_of_backups_is_read_and_the_rest_has_defaults(tmp_path: Path) -> None:
    path = write(tmp_path / "host.toml", '[backup]\ntarget = "/b"\nrate-mib-s = 5\nif-not-held = "keep"\n[vm.a]\n')
    assert read_backups(path) == Backups(Path("/b"), rate_mib_s=5, if_not_held="keep")
    assert read_backups(tmp_path / "none.toml") == Backups()


def test_an_empty_file_has_none(tmp_path: Path) -> None:
    assert read_config(write(tmp_path / "host.toml", "")) == {}


def test_a_connect_string_needs_no_configuration(tmp_path: Path) -> None:
    assert find_route("vsock:42", tmp_path / "absent") == Route("vsock:42")


def test_a_name_leads_to_its_agent_and_token(tmp_path: Path) -> None:
    token = write(tmp_path / "token", "s3cret\n")
    path = write(tmp_path / "host.toml", f'[vm.web1]\nagent = "vsock:42"\ntoken-file = "{token}"\n')
    assert find_route("web1", path) == Route("vsock:42", "s3cret")


def test_a_token_file_that_was_given_wins(tmp_path: Path) -> None:
    token = write(tmp_path / "token", "other")
    path = write(tmp_path / "host.toml", '[vm.web1]\nagent = "vsock:42"\ntoken-file = "/absent"\n')
    assert find_route("web1", path, token) == Route("vsock:42", "other")


@pytest.mark.parametrize(
    ("target", "problem"),
    [
        ("web2", "vm.web2: no such VM, there are: db1, web1"),
        ("db1", "vm.db1: no agent"),
    ],
)
def test_a_name_that_leads_nowhere_is_told(tmp_path: Path, target: str, problem: str) -> None:
    path = write(tmp_path / "host.toml", '[vm.web1]\nagent = "vsock:42"\n[vm.db1]\nqmp = "unix:/q"\n')
    with pytest.raises(ConfigError) as caught:
        find_route(target, path)
    assert problem in str(caught.value)


def test_a_name_without_a_configuration_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file, and 'web1' is no connect string"):
        find_route("web1", tmp_path / "absent")


def test_a_bad_connect_string_is_not_taken_for_a_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected vsock:CID"):
        find_route("vsock:forty-two", tmp_path / "absent")


@pytest.mark.parametrize("mode", [0o604, 0o602, 0o601, 0o644, 0o666])
def test_a_token_that_every_user_can_read_is_refused(tmp_path: Path, mode: int) -> None:
    with pytest.raises(ConfigError, match="opens the token to every user"):
        read_token(write(tmp_path / "token", "s3cret", mode))


@pytest.mark.parametrize("mode", [0o600, 0o400, 0o640])
def test_a_token_is_read_without_its_newline(tmp_path: Path, mode: int) -> None:
    assert read_token(write(tmp_path / "token", "s3cret\n", mode)) == "s3cret"


@pytest.mark.parametrize("content", [b"", b"\n", b"\xff\xfe", b"x" * 5000])
def test_a_token_that_is_none_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "token"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(ConfigError, match="token"):
        read_token(path)


def test_an_absent_token_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read the token: No such file"):
        read_token(tmp_path / "absent")
