"""Sizes and durations."""

from __future__ import annotations

import pytest

from ballast.host.quantity import format_ms, format_size, parse_duration, parse_size


@pytest.mark.parametrize("text", ["", "x", "-1", "1X", "M", "1 2", "1e9", "512MM", "0x10", "inf", "nan"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no size"):
        parse_size(text)


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("0", 0),
        ("4096", 4096),
        ("512M", 512 << 20),
        ("512MiB", 512 << 20),
        ("512mb", 512 << 20),
        ("1.5G", 3 << 29),
        ("2 T", 2 << 40),
        ("1K", 1024),
    ],
)
def test_sizes(text: str, size_bytes: int) -> None:
    assert parse_size(text) == size_bytes


@pytest.mark.parametrize("text", ["", "x", "-1s", "1d", "s", "1s2", "1e3", "inf"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no duration"):
        parse_duration(text)


@pytest.mark.parametrize(("text", "seconds"), [("30s", 30), ("500ms", 0.5), ("2m", 120), ("1h", 3600), ("1.5", 1.5)])
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1 << 20, "1 MiB"), (3 << 29, "1.5 GiB"), (1 << 50, "1024 TiB")],
)
def test_sizes_are_shown_short(size_bytes: int, text: str) -> None:
    assert format_size(size_bytes) == text


@pytest.mark.parametrize(
    ("duration_ms", "text"),
    [
        (0, "0 ms"),
        (1.25, "1.2 ms"),
        (180.4, "180 ms"),
        (1234.5, "1.23 s"),
        (59_990, "60 s"),
        (125_000, "2 min 5 s"),
        (12_000_000, "3 h 20 min"),
        (float("inf"), "?"),
    ],
)
def test_durations_are_shown_short(duration_ms: float, text: str) -> None:
    assert format_ms(duration_ms) == text
