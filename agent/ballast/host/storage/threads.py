"""Work that is not left alone in the middle, whoever is cancelled meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


async def to_its_end(call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """As ``asyncio.to_thread``, but whoever is cancelled meanwhile goes only when the call is over."""
    return await undisturbed(asyncio.to_thread(call, *args, **kwargs))


async def undisturbed(work: Coroutine[Any, Any, T]) -> T:
    """Await work that cannot be cancelled from here: whoever is cancelled meanwhile goes only when it is over."""
    running = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        await asyncio.wait({running})
        if not running.cancelled():
            running.exception()  # nobody else asks for it
        raise
