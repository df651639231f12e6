"""The agent's configuration: TOML -> frozen dataclasses.

``/etc/ballast/agent.toml``, then ``/etc/ballast/agent.d/*.toml`` in order of their names; a later file wins key by
key. A wrong key or value stops the start: an agent that guesses what its administrator meant is no use in a backup.
"""

from __future__ import annotations

import dataclasses
import json
import re
import tomllib
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

T = TypeVar("T")


class ConfigError(Exception):
    """A file, a key in it, and what is wrong with it."""

    def __init__(self, path: Path, key: str, reason: str) -> None:
        super().__init__(f"{path}: {key}: {reason}" if key else f"{path}: {reason}")


def between(least: int, most: int) -> dict[str, Any]:
    """Metadata of a field: the range that its value must be in."""
    return {"least": least, "most": most}


def shaped(pattern: str, expected: str) -> dict[str, Any]:
    """Metadata of a field: the regular expression that each string of its list must match, and what that means."""
    return {"pattern": pattern, "expected": expected}


@dataclass(frozen=True, slots=True)
class Agent:
    """[agent]"""

    log_level: Literal["debug", "info", "warning", "error"] = "info"


@dataclass(frozen=True, slots=True)
class Transports:
    """[transports]: an empty name switches a transport off."""

    vsock: bool = True
    virtio_serial: str = "org.ballast.agent.0"
    unix: str = "/run/ballast/agent.sock"
    trust_privileged_port: bool = False


@dataclass(frozen=True, slots=True)
class Dbus:
    """[dbus]"""

    enabled: bool = True


@dataclass(frozen=True, slots=True)
class Policy:
    """[policy]: with a list ``allow`` only its commands, without those of ``block``."""

    allow: tuple[str, ...] = ()
    block: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Limits:
    """[limits]: what a peer can make grow."""

    peers: int = field(default=64, metadata=between(1, 512))
    queue_bytes: int = field(default=1 << 18, metadata=between(1 << 14, 1 << 24))
    triggers: int = field(default=32, metadata=between(1, 1024))
    write_timeout_ms: int = field(default=30_000, metadata=between(100, 600_000))


@dataclass(frozen=True, slots=True)
class Memory:
    """[memory]"""

    # Before 0.3 it was true or false, and may be still.
    online: Literal["agent", "kernel", "off"] = field(default="agent", metadata={True: "agent", False: "off"})
    # "auto": it stays empty where the kernel's own is in use.
    balloon: Literal["auto", "always", "off"] = "auto"


# Below the root of control groups, without "." and ".."; ours is what the level leaves out.
_CONTROL_GROUP = r"(?!ballast\.slice(/|$))(?!\.{1,2}(/|$))[^/]+(/(?!\.{1,2}(/|$))[^/]+)*"


@dataclass(frozen=True, slots=True)
class Pressure:
    """[pressure]: a level is left when the share of time is below ``ease_percent`` of what it takes to get there."""

    medium_percent: int = field(default=10, metadata=between(1, 100))
    critical_percent: int = field(default=10, metadata=between(1, 100))
    ease_percent: int = field(default=50, metadata=between(1, 100))
    window_ms: int = field(default=1_000, metadata=between(500, 10_000))
    cgroups: tuple[str, ...] = field(
        default=(),
        metadata=shaped(_CONTROL_GROUP, "control groups such as system.slice/postgresql.service, none of ours"),
    )


@dataclass(frozen=True, slots=True)
class Quiesce:
    """[quiesce]: ``lease_ms`` is that of guest-fsfreeze-freeze, which names none."""

    lease_ms: int = field(default=120_000, metadata=between(1_000, 600_000))
    open_timeout_ms: int = field(default=5_000, metadata=between(100, 60_000))
    sync_timeout_ms: int = field(default=30_000, metadata=between(0, 600_000))
    freeze_timeout_ms: int = field(default=10_000, metadata=between(100, 600_000))


@dataclass(frozen=True, slots=True)
class Writers:
    """[writers]: all of them, until the file systems are about to be frozen. One's own table is [writer.NAME]."""

    enabled: bool = True
    timeout_ms: int = field(default=60_000, metadata=between(1_000, 600_000))


@dataclass(frozen=True, slots=True)
class Config:
    """The whole of it, one field a table."""

    agent: Agent = Agent()
    transports: Transports = Transports()
    dbus: Dbus = Dbus()
    policy: Policy = Policy()
    limits: Limits = Limits()
    memory: Memory = Memory()
    pressure: Pressure = Pressure()
    quiesce: Quiesce = Quiesce()
    writers: Writers = Writers()
    writer: dict[str, dict[str, Any]] = field(default_factory=dict)


def read_config(path: Path, drop_ins: Path) -> Config:
    """Read ``path`` and each ``*.toml`` in ``drop_ins``; absent files are no error. ConfigError, OSError."""
    tables: dict[str, dict[str, Any]] = {}
    for file in [path, *sorted(drop_ins.glob("*.toml"))]:
        try:
            content = tomllib.loads(file.read_text())
        except FileNotFoundError:
            continue
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(file, "", str(error)) from error
        for name, values in _check_file(file, content).items():
            _merge(tables.setdefault(name, {}), values)
    kinds = typing.get_type_hints(Config)
    settings: dict[str, Any] = {name: kinds[name](**v) for name, v in tables.items() if name != "writer"}
    return Config(**settings, writer=tables.get("writer", {}))


def _merge(table: dict[str, Any], later: dict[str, Any]) -> None:
    """A later file wins key by key, in the tables of writers too."""
    for key, value in later.items():
        if isinstance(value, dict) and isinstance(table.get(key), dict):
            table[key].update(value)
        else:
            table[key] = value


def _check_file(path: Path, content: dict[str, Any]) -> dict[str, dict[str, Any]]:
    kinds = typing.get_type_hints(Config)
    for name, table in content.items():
        if name not in kinds:
            raise ConfigError(path, name, f"unknown table, expected one of {', '.join(kinds)}")
        if not isinstance(table, dict):
            raise ConfigError(path, name, "expected a table")
    return {
        name: _check_table(path, name, kinds[name], table) if name != "writer" else _check_writers(path, table)
        for name, table in content.items()
    }


def _check_writers(path: Path, tables: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """[writer.NAME]: beyond ``enabled`` and what JSON can carry, what is in one is between it and the writer."""
    for name, table in tables.items():
        values = _expect(path, f"writer.{name}", table, dict, "a table")
        _expect(path, f"writer.{name}.enabled", values.get("enabled", True), bool, "true or false")
        try:
            json.dumps(values)
        except TypeError as error:
            raise ConfigError(path, f"writer.{name}", "dates and times cannot be passed on") from error
    return tables


def _check_table(path: Path, table: str, kind: type, values: dict[str, Any]) -> dict[str, Any]:
    fields = {f.name.replace("_", "-"): f for f in dataclasses.fields(kind)}
    hints = typing.get_type_hints(kind)
    result = {}
    for key, value in values.items():
        where = f"{table}.{key}"
        if key not in fields:
            raise ConfigError(path, where, f"unknown key, expected one of {', '.join(fields)}")
        field_ = fields[key]
        result[field_.name] = _check_value(path, where, hints[field_.name], field_.metadata, value)
    return result


def _check_value(path: Path, where: str, annotation: Any, limits: Any, value: Any) -> Any:
    if annotation is bool:
        return _expect(path, where, value, bool, "true or false")
    if annotation is int:
        number = _expect(path, where, value, int, "a whole number")
        if not limits["least"] <= number <= limits["most"]:
            raise ConfigError(path, where, f"expected {limits['least']} to {limits['most']}, found {number}")
        return number
    if typing.get_origin(annotation) is Literal:
        choices = typing.get_args(annotation)
        if isinstance(value, bool):
            value = limits.get(value, value)
        if value not in choices:
            raise ConfigError(path, where, f"expected one of {', '.join(choices)}, found {value!r}")
        return value
    if annotation is str:
        return _expect(path, where, value, str, "a string")
    strings = tuple(
        _expect(path, where, item, str, "a list of strings")
        for item in _expect(path, where, value, list, "a list of strings")
    )
    for string in strings:
        if not re.fullmatch(limits.get("pattern", "(?s).*"), string):
            raise ConfigError(path, where, f"expected {limits['expected']}, found {string!r}")
    return strings


def _expect(path: Path, where: str, value: Any, kind: type[T], expected: str) -> T:
    # A TOML boolean is an int to Python.
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ConfigError(path, where, f"expected {expected}, found {value!r}")
    return value
