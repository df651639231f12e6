"""Blocking kernel calls beside the event loop.

Not asyncio's executor: its threads are few, and joined at exit. A call that the kernel never returns from (open on a
dead device, syncfs behind a stuck disk) must hold up neither another call nor our own end.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def in_thread(call: Callable[[], T], *, name: str, discard: Callable[[T], object] | None = None) -> asyncio.Future[T]:
    """Run ``call`` in a daemon thread of its own.

    The future may be abandoned: the call then ends unheard, and ``discard`` gets its result.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, error: BaseException | None) -> None:
        if future.done():
            if error is None and discard is not None:
                discard(result)  # type: ignore[arg-type]
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)  # type: ignore[arg-type]  # None only where T is None

    def run() -> None:
        result, error = None, None
        try:
            result = call()
        except BaseException as caught:  # noqa: BLE001 - handed over to whoever awaits the future
            error = caught
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
            loop.call_soon_threadsafe(settle, result, error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return future
