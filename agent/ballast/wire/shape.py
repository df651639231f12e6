"""JSON values <-> annotated Python: the arguments of commands and the records of ``names``.

Dashes and underscores: the wire says ``phys-index``, Python says ``phys_index``; only this file maps them.
Errors are worded as QEMU's input visitor words them (qapi/qobject-input-visitor.c, QEMU 10.0), because clients
compare texts: "Parameter 'x' is missing", "Invalid parameter type for 'x', expected: integer",
"Parameter 'x' is unexpected".
"""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from ballast.wire.errors import BadRequest

T = TypeVar("T")

# QAPI's uint64, for a record's field: QEMU has a text of its own for it, and no text for other types.
Uint64 = Annotated[int, "uint64"]

_INT64_MIN, _INT64_MAX = -(2**63), 2**63 - 1
_SCALARS: dict[Any, tuple[str, tuple[type, ...]]] = {
    int: ("integer", (int,)),
    float: ("number", (int, float)),
    str: ("string", (str,)),
    bool: ("boolean", (bool,)),
}


def wire_name(python_name: str) -> str:
    """``phys_index`` -> ``phys-index``."""
    return python_name.rstrip("_").replace("_", "-")


def to_wire(value: Any) -> Any:
    """Make a JSON value of a record: a field whose default is None is left out when it is None.

    Keys of mappings are wire names already.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            name: to_wire(item)
            for name, optional, item in ((n, o, getattr(value, a)) for a, n, o in _wire_fields(type(value)))
            if not (optional and item is None)
        }
    if isinstance(value, (list, tuple)):
        return [to_wire(item) for item in value]
    if isinstance(value, Mapping):
        return {key: to_wire(item) for key, item in value.items()}
    return value


@functools.cache
def _wire_fields(record: type) -> tuple[tuple[str, str, bool], ...]:
    return tuple((f.name, wire_name(f.name), f.default is None) for f in dataclasses.fields(record))


@functools.cache
def parameters_of(record: type) -> dict[str, tuple[str, Any, bool]]:
    """Give the fields of a dataclass as {wire name: (Python name, annotation, required)}."""
    hints = typing.get_type_hints(record, include_extras=True)
    missing = dataclasses.MISSING
    return {
        wire_name(f.name): (f.name, hints[f.name], f.default is missing and f.default_factory is missing)
        for f in dataclasses.fields(record)
    }


def read_record(record: type[T], value: Any, *, where: str = "", strict: bool = False) -> T:
    """Build the dataclass ``record`` from a JSON object; unknown fields are ignored unless ``strict``."""
    if not isinstance(value, dict):
        raise _wrong_type(where, "object")
    expected = parameters_of(typing.cast("Any", record))
    return record(**read_parameters(expected, value, where=where, strict=strict))


def read_parameters(
    expected: Mapping[str, tuple[str, Any, bool]], given: Mapping[str, Any], *, where: str = "", strict: bool = True
) -> dict[str, Any]:
    """Check ``given`` against ``expected`` (as of ``parameters_of``) and return Python keyword arguments."""
    prefix = f"{where}." if where else ""
    result: dict[str, Any] = {}
    for name, (python_name, annotation, required) in expected.items():
        if name in given:
            result[python_name] = read_value(annotation, given[name], prefix + name, strict=strict)
        elif required:
            raise BadRequest(f"Parameter '{prefix}{name}' is missing", argument=prefix + name)
    if strict:
        for name in given:
            if name not in expected:
                raise BadRequest(f"Parameter '{prefix}{name}' is unexpected", argument=prefix + name)
    return result


def read_value(annotation: Any, value: Any, where: str, *, strict: bool) -> Any:
    """Convert one JSON value to ``annotation`` or raise BadRequest that names ``where``."""
    if annotation is Any:
        return value
    if annotation == Uint64:
        return _read_uint64(value, where)
    if annotation in _SCALARS:
        return _read_scalar(annotation, value, where)
    if dataclasses.is_dataclass(annotation):
        return read_record(typing.cast("type[Any]", annotation), value, where=where, strict=strict)
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        # QEMU's visitor takes no null for an optional argument; records may hold one.
        return None if value is None and not strict else _read_union(args, value, where, strict=strict)
    if origin is typing.Literal:
        return _read_choice(args, value, where, strict=strict)
    if origin in (list, tuple):
        return _read_sequence(origin, args, value, where, strict=strict)
    if origin is dict:
        if not isinstance(value, dict):
            raise _wrong_type(where, "object")
        return {k: read_value(args[1], v, f"{where}.{k}", strict=strict) for k, v in value.items()}
    raise TypeError(f"no wire form for {annotation!r}")


def _read_scalar(annotation: Any, value: Any, where: str) -> Any:
    expected, accepted = _SCALARS[annotation]
    if not isinstance(value, accepted) or (isinstance(value, bool) and annotation is not bool):
        raise _wrong_type(where, expected)
    # QEMU's lexer makes a double of an integer that fits no 64 bits, and a double is no integer.
    if annotation is int and isinstance(value, int) and not _INT64_MIN <= value <= _INT64_MAX:
        raise _wrong_type(where, expected)
    return value


def _read_uint64(value: Any, where: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not _INT64_MIN <= value < 2**64:
        raise BadRequest(f"Parameter '{where}' expects uint64", argument=where)
    return value % 2**64  # as QEMU's visitor, which takes negative numbers too


def _read_union(args: tuple[Any, ...], value: Any, where: str, *, strict: bool) -> Any:
    """Read an optional value (X | None): more kinds than one are not needed on this wire."""
    (kind,) = (arg for arg in args if arg is not type(None))
    return read_value(kind, value, where, strict=strict)


def _read_choice(choices: tuple[Any, ...], value: Any, where: str, *, strict: bool) -> Any:
    """Read one of ``choices``, or unless ``strict`` a word of a later release, for which no whole answer is lost."""
    if not isinstance(value, str):
        raise _wrong_type(where, "string")
    if strict and value not in choices:
        raise BadRequest(f"Parameter '{where}' does not accept value '{value}'", argument=where, accepts=list(choices))
    return value


def _read_sequence(origin: Any, args: tuple[Any, ...], value: Any, where: str, *, strict: bool) -> Any:
    if not isinstance(value, list):
        raise _wrong_type(where, "array")
    if origin is list:
        return [read_value(args[0], item, f"{where}[{i}]", strict=strict) for i, item in enumerate(value)]
    kinds = args[:1] * len(value) if len(args) == 2 and args[1] is Ellipsis else args
    if len(kinds) != len(value):
        raise BadRequest(f"Parameter '{where}' expects {len(kinds)} elements", argument=where)
    return tuple(
        read_value(kind, item, f"{where}[{i}]", strict=strict)
        for i, (kind, item) in enumerate(zip(kinds, value, strict=True))
    )


def _wrong_type(where: str, expected: str) -> BadRequest:
    return BadRequest(f"Invalid parameter type for '{where}', expected: {expected}", argument=where)
