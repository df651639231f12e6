"""Records and arguments: QEMU's words for what is wrong, and what of the wire is forgiven."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from ballast.wire.errors import BadRequest
from ballast.wire.shape import Uint64, parameters_of, read_parameters, read_record, to_wire, wire_name


@dataclass(frozen=True, slots=True)
class Part:
    phys_index: int
    zone: Literal["auto", "kernel"] = "auto"


@dataclass(frozen=True, slots=True)
class Whole:
    id_: str
    lease_ms: int = 5
    share: float = 0.5
    fast: bool = False
    note: str | None = None
    parts: list[Part] = field(default_factory=list)
    ranges: list[tuple[int, int]] = field(default_factory=list)
    bytes_of: dict[str, int] = field(default_factory=dict)


@pytest.mark.parametrize(
    ("given", "desc"),
    [
        ({}, "Parameter 'id' is missing"),
        ({"id": 7}, "Invalid parameter type for 'id', expected: string"),
        ({"id": None}, "Invalid parameter type for 'id', expected: string"),
        ({"id": "a", "lease-ms": "7"}, "Invalid parameter type for 'lease-ms', expected: integer"),
        ({"id": "a", "lease-ms": 7.0}, "Invalid parameter type for 'lease-ms', expected: integer"),
        ({"id": "a", "lease-ms": True}, "Invalid parameter type for 'lease-ms', expected: integer"),
        ({"id": "a", "lease-ms": 2**63}, "Invalid parameter type for 'lease-ms', expected: integer"),
        ({"id": "a", "share": "x"}, "Invalid parameter type for 'share', expected: number"),
        ({"id": "a", "share": False}, "Invalid parameter type for 'share', expected: number"),
        ({"id": "a", "fast": 1}, "Invalid parameter type for 'fast', expected: boolean"),
        ({"id": "a", "lease_ms": 7}, "Parameter 'lease_ms' is unexpected"),
        ({"id": "a", "foo": 1}, "Parameter 'foo' is unexpected"),
        ({"id": "a", "parts": {}}, "Invalid parameter type for 'parts', expected: array"),
        ({"id": "a", "parts": [7]}, "Invalid parameter type for 'parts[0]', expected: object"),
        ({"id": "a", "parts": [{}]}, "Parameter 'parts[0].phys-index' is missing"),
        ({"id": "a", "parts": [{"phys-index": 1, "x": 1}]}, "Parameter 'parts[0].x' is unexpected"),
        (
            {"id": "a", "parts": [{"phys-index": 1}, {"phys-index": 1, "zone": "x"}]},
            "Parameter 'parts[1].zone' does not accept value 'x'",
        ),
        (
            {"id": "a", "parts": [{"phys-index": 1, "zone": 1}]},
            "Invalid parameter type for 'parts[0].zone', expected: string",
        ),
        ({"id": "a", "ranges": [[1]]}, "Parameter 'ranges[0]' expects 2 elements"),
        ({"id": "a", "bytes-of": []}, "Invalid parameter type for 'bytes-of', expected: object"),
        ({"id": "a", "bytes-of": {"x": "y"}}, "Invalid parameter type for 'bytes-of.x', expected: integer"),
    ],
)
def test_bad_arguments_are_told_in_qemus_words(given: dict[str, Any], desc: str) -> None:
    with pytest.raises(BadRequest) as caught:
        read_parameters(parameters_of(Whole), given)
    assert caught.value.desc == desc


@pytest.mark.parametrize("value", [None, 5, "x", []])
def test_a_record_is_an_object(value: Any) -> None:
    with pytest.raises(BadRequest):
        read_record(Whole, value)


@pytest.mark.parametrize(("given", "read"), [(0, 0), (2**64 - 1, 2**64 - 1), (-1, 2**64 - 1), (-(2**63), 2**63)])
def test_qapis_uint64_takes_what_fits_64_bits(given: int, read: int) -> None:
    assert read_parameters({"x": ("x", Uint64, True)}, {"x": given}) == {"x": read}


@pytest.mark.parametrize("given", [2**64, -(2**63) - 1, True, 1.0, "1", None, []])
def test_qapis_uint64_has_a_text_of_its_own(given: Any) -> None:
    with pytest.raises(BadRequest, match="Parameter 'x' expects uint64"):
        read_parameters({"x": ("x", Uint64, True)}, {"x": given})


def test_unknown_fields_of_records_are_ignored_at_any_depth() -> None:
    read = read_record(Whole, {"id": "a", "new": 1, "parts": [{"phys-index": 3, "newer": {}}]})
    assert read == Whole("a", parts=[Part(3)])


def test_words_of_a_later_release_are_read_in_records_and_refused_in_arguments() -> None:
    later: dict[str, Any] = {"phys-index": 3, "zone": "device"}
    assert to_wire(read_record(Part, later)) == later
    with pytest.raises(BadRequest, match="does not accept value 'device'"):
        read_record(Part, later, strict=True)


def test_records_come_back_as_they_were() -> None:
    whole = Whole("a", 7, 1.5, True, "x", [Part(1, "kernel")], [(1, 2)], {"a": 3})
    assert read_record(Whole, to_wire(whole)) == whole


def test_an_optional_field_that_is_none_is_left_out() -> None:
    assert "note" not in to_wire(Whole("a"))
    assert to_wire(Part(3)) == {"phys-index": 3, "zone": "auto"}


@pytest.mark.parametrize(("python", "wire"), [("phys_index", "phys-index"), ("id_", "id"), ("bytes", "bytes")])
def test_names_are_dashed_on_the_wire(python: str, wire: str) -> None:
    assert wire_name(python) == wire
