"""Sizes and durations as people write them: 512M, 30s; and as they read them."""

from __future__ import annotations

import math
import re

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", re.IGNORECASE)
_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|s|m|h|)")
_SHIFTS = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}
_SECONDS = {"ms": 0.001, "": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0}


def parse_size(text: str) -> int:
    """Bytes of ``512M`` or ``1.5G``: K, M, G and T are powers of 1024, a bare number is bytes."""
    if not (match := _SIZE.fullmatch(text)):
        raise ValueError(f"{text!r} is no size: expected something like 512M or 2G")
    return int(float(match[1]) * (1 << _SHIFTS[match[2].upper()]))


def parse_duration(text: str) -> float:
    """Seconds of ``30s``, ``500ms``, ``2m`` or ``1h``; a bare number is seconds."""
    if not (match := _DURATION.fullmatch(text)):
        raise ValueError(f"{text!r} is no duration: expected something like 30s or 500ms")
    return float(match[1]) * _SECONDS[match[2]]


def format_size(size_bytes: int) -> str:
    """``512 MiB``, ``1.5 GiB``."""
    value, unit = float(size_bytes), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if abs(value) < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.0f} {unit}" if value == int(value) or abs(value) >= 100 else f"{value:.1f} {unit}"


def format_ms(duration_ms: float) -> str:
    """``4 ms``, ``1.25 s``, ``2 min 5 s``, ``3 h 20 min``."""
    if not math.isfinite(duration_ms):
        return "?"
    if duration_ms < 1000:
        return f"{duration_ms:.0f} ms" if duration_ms >= 10 or duration_ms == 0 else f"{duration_ms:.1f} ms"
    seconds = duration_ms / 1000
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"
