"""The host's configuration: which virtual machines there are, and how to reach each.

    # /etc/ballast/host.toml
    [vm.web1]
    agent = "vsock:42"
    qmp = "unix:/run/web1/qmp"
    safe-vhost-user = ["fs0"]
    token-file = "/etc/ballast/tokens/web1"

    [backup]
    target = "/srv/backups"

A wrong key or value is an error with file, key and reason: a host that guesses freezes the wrong guest.
"""

from __future__ import annotations

import os
import stat
import tomllib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

from ballast.host.connect import parse_target

PATH = Path("/etc/ballast/host.toml")
IfNotHeld = Literal["retry", "discard", "keep"]
IF_NOT_HELD = get_args(IfNotHeld)
_SCHEMES = ("vsock:", "unix:")
_TOKEN_LIMIT_BYTES = 4096
_BACKUP_NUMBERS = {
    "fleece-timeout-s": (1, 60),
    "backups-at-once": (1, 64),
    "freezes-at-once": (1, 64),
    "rate-mib-s": (1, 1 << 20),
}
_PATHS = ("token-file", "tpm-state")


class ConfigError(Exception):
    """A file, a key in it, and what is wrong with it."""

    def __init__(self, path: Path, key: str, reason: str) -> None:
        super().__init__(f"{path}: {key}: {reason}" if key else f"{path}: {reason}")


@dataclass(frozen=True, slots=True)
class Vm:
    """``[vm.NAME]``: connect strings of the agent and of QMP, libvirt's "URI/DOMAIN", and the file of the token.

    ``safe_vhost_user`` are ids of vhost-user devices whose processes have pinned none of the guest's memory.
    """

    agent: str | None = None
    qmp: str | None = None
    libvirt: str | None = None
    token_file: Path | None = None
    safe_vhost_user: tuple[str, ...] = ()
    tpm_state: Path | None = None


@dataclass(frozen=True, slots=True)
class Backups:
    """``[backup]``: where backups go, and what they may take of this host.

    ``fleece`` is where the blocks are kept that a guest overwrites while it is copied: on a disk as fast as its own. A
    block that is not there within ``fleece_timeout_s`` (1 to 60) ends the backup, and the guest goes on. ``rate`` is
    for all backups together. ``if_not_held`` says what becomes of a backup whose freeze did not hold.
    """

    target: Path = Path("/var/lib/ballast/backups")
    fleece: Path = Path("/var/lib/ballast/fleece")
    fleece_timeout_s: int = 1
    key_file: Path | None = None
    backups_at_once: int = 2
    freezes_at_once: int = 1
    rate_mib_s: int | None = None
    if_not_held: IfNotHeld = "retry"


@dataclass(frozen=True, slots=True)
class Route:
    """How to reach an agent."""

    connect: str
    token: str | None = None


def find_vm(target: str, config: Path = PATH) -> Vm:
    """What there is to know of a connect string, or of the name of a VM in ``config``.

    ValueError for a bad connect string, ConfigError.
    """
    if target.startswith(_SCHEMES):
        parse_target(target)
        return Vm(agent=target)
    return _find_vm(target, config)


def find_route(target: str, config: Path = PATH, token_file: Path | None = None) -> Route:
    """Make a route of a target; ``token_file`` wins over the VM's. ValueError, ConfigError."""
    vm = find_vm(target, config)
    if vm.agent is None:
        raise ConfigError(config, f"vm.{target}", 'no agent = "..." here, so there is no way to reach its agent')
    token_file = token_file or vm.token_file
    return Route(vm.agent, read_token(token_file) if token_file else None)


def _find_vm(name: str, path: Path) -> Vm:
    try:
        vms = read_config(path)
    except FileNotFoundError as error:
        raise ConfigError(path, "", f"no such file, and {name!r} is no connect string") from error
    except OSError as error:
        raise ConfigError(path, "", error.strerror or str(error)) from error
    if name not in vms:
        raise ConfigError(path, f"vm.{name}", f"no such VM, there are: {', '.join(sorted(vms)) or 'none'}")
    return vms[name]


def read_config(path: Path = PATH) -> dict[str, Vm]:
    """Read all VMs by name. ConfigError, OSError."""
    return {name: _read_vm(path, name, values) for name, values in _read(path).get("vm", {}).items()}


def read_backups(path: Path = PATH) -> Backups:
    """Read what there is to know of backups; all of it has defaults, also the file. ConfigError, OSError."""
    try:
        values = _read(path).get("backup", {})
    except FileNotFoundError:
        values = {}
    known = {field.name.replace("_", "-"): field for field in fields(Backups)}
    found: dict[str, Any] = {}
    for key, value in values.items():
        if key not in known:
            raise ConfigError(path, f"backup.{key}", f"unknown key, expected one of {', '.join(known)}")
        found[known[key].name] = _backup_value(path, key, value)
    return Backups(**found)


def _backup_value(path: Path, key: str, value: Any) -> Any:
    if key in _BACKUP_NUMBERS:
        least, most = _BACKUP_NUMBERS[key]
        if type(value) is not int or not least <= value <= most:
            raise ConfigError(path, f"backup.{key}", f"expected a number from {least} to {most}, found {value!r}")
        return value
    if key == "if-not-held":
        if value not in IF_NOT_HELD:
            raise ConfigError(path, f"backup.{key}", f"expected one of {', '.join(IF_NOT_HELD)}, found {value!r}")
        return value
    if not isinstance(value, str) or not value.startswith("/"):
        raise ConfigError(path, f"backup.{key}", f"expected an absolute path, found {value!r}")
    return Path(value)


def _read(path: Path) -> dict[str, Any]:
    try:
        content = tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(path, "", str(error)) from error
    for key, value in content.items():
        if key not in ("vm", "backup"):
            raise ConfigError(path, key, "unknown key, expected [vm.NAME] or [backup]")
        if not isinstance(value, dict):
            raise ConfigError(path, key, "expected tables: [vm.NAME] and [backup]")
    return content


def _read_vm(path: Path, name: str, values: Any) -> Vm:
    where = f"vm.{name}"
    if not isinstance(values, dict):
        raise ConfigError(path, where, f"expected a table, found {values!r}")
    if name.startswith(_SCHEMES):
        raise ConfigError(path, where, "a name that begins like a connect string could not be used")
    known = {field.name.replace("_", "-"): field.name for field in fields(Vm)}
    for key, value in values.items():
        if key not in known:
            raise ConfigError(path, f"{where}.{key}", f"unknown key, expected one of {', '.join(known)}")
        if key == "safe-vhost-user":
            if not isinstance(value, list) or not all(isinstance(one, str) and one for one in value):
                raise ConfigError(path, f"{where}.{key}", f"expected a list of strings, found {value!r}")
        elif not isinstance(value, str) or not value:
            raise ConfigError(path, f"{where}.{key}", f"expected a string, found {value!r}")
    if "agent" in values:
        try:
            parse_target(values["agent"])
        except ValueError as error:
            raise ConfigError(path, f"{where}.agent", str(error)) from error
    read: dict[str, Any] = {
        known[key]: Path(value) if key in _PATHS else value for key, value in values.items() if key != "safe-vhost-user"
    }
    return Vm(**read, safe_vhost_user=tuple(values.get("safe-vhost-user", ())))


def read_token(path: Path) -> str:
    """Read a token, without the newline at its end; refuse a file that users other than owner and group can use."""
    try:
        with path.open("rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            content = file.read(_TOKEN_LIMIT_BYTES + 1)
    except OSError as error:
        raise ConfigError(path, "", f"cannot read the token: {error.strerror or error}") from error
    if mode & stat.S_IRWXO:
        raise ConfigError(path, "", f"mode {mode:04o} opens the token to every user; chmod o= it and make a new one")
    try:
        token = content.decode().strip()
    except UnicodeDecodeError as error:
        raise ConfigError(path, "", "the token is no UTF-8 text") from error
    if not token or len(content) > _TOKEN_LIMIT_BYTES:
        raise ConfigError(path, "", f"expected a token of 1 to {_TOKEN_LIMIT_BYTES} bytes")
    return token
