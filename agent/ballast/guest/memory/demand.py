"""How much memory the guest needs now: pure functions over readings."""

from __future__ import annotations


def demand_parts(*, total_bytes: int, available_bytes: int) -> dict[str, int]:
    """Named parts whose sum is the demand.

    ``unreclaimable``: what the kernel could not give to a new program without swapping, total less MemAvailable
    (Documentation/filesystems/proc.rst).
    """
    return {"unreclaimable": max(0, total_bytes - available_bytes)}
