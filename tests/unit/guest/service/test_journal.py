"""The journal's protocol, as journald reads it."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ballast.guest.service.journal import VALUE_BYTES, encode, send

NAMES = st.text("ABCXYZ_09", min_size=1, max_size=20)


def decode(data: bytes) -> dict[str, bytes]:
    """By the page that describes it."""
    fields = {}
    while data:
        name, _, rest = data.partition(b"\n")
        if b"=" in name:
            name, _, value = name.partition(b"=")
            data = rest
        else:
            length = int.from_bytes(rest[:8], "little")
            value, end, data = rest[8 : 8 + length], rest[8 + length : 9 + length], rest[9 + length :]
            assert end == b"\n"
        fields[name.decode()] = value
    return fields


def test_lines_with_and_without_a_newline() -> None:
    assert encode({"MESSAGE": "a=b", "PRIORITY": 6}) == b"MESSAGE=a=b\nPRIORITY=6\n"
    assert encode({"MESSAGE": "a\nb"}) == b"MESSAGE\n\x03\0\0\0\0\0\0\0a\nb\n"


@given(st.dictionaries(NAMES, st.text(st.characters(), max_size=50), min_size=1))
def test_whatever_a_value_is_it_stays_in_its_field(fields: dict[str, str]) -> None:
    expected = {name: value.encode(errors="backslashreplace") for name, value in fields.items()}
    assert decode(encode(fields)) == expected


@pytest.mark.parametrize("text", ["x", "é", "\n", "𝄞"])
def test_what_is_too_long_is_cut_and_still_text(text: str) -> None:
    value = decode(encode({"MESSAGE": "a" + text * VALUE_BYTES}))["MESSAGE"]
    assert VALUE_BYTES - 4 < len(value) <= VALUE_BYTES
    assert value.decode() == ("a" + text * VALUE_BYTES)[: len(value.decode())]


def test_an_entry_is_a_datagram(tmp_path: Path) -> None:
    path = str(tmp_path / "journal")
    with pytest.raises(FileNotFoundError):
        send({"MESSAGE": "x"}, path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as journald:
        journald.bind(path)
        send({"MESSAGE": "x" * VALUE_BYTES, "BALLAST_PEER": "y\n" * VALUE_BYTES}, path)
        assert len(journald.recv(1 << 20)) > 2 * VALUE_BYTES
