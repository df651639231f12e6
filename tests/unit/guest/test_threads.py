"""Blocking calls beside the event loop."""

from __future__ import annotations

import asyncio
import threading

import pytest

from ballast.guest.threads import in_thread


async def test_the_result_comes_back_from_another_thread() -> None:
    assert await in_thread(lambda: threading.current_thread().name, name="elsewhere") == "elsewhere"


async def test_what_it_raises_comes_back() -> None:
    def fail() -> None:
        raise FileNotFoundError("x")

    with pytest.raises(FileNotFoundError, match="x"):
        await in_thread(fail, name="fails")


async def test_an_abandoned_call_ends_unheard_and_its_result_is_discarded() -> None:
    go, discarded = threading.Event(), asyncio.Event()
    results = []

    def call() -> int:
        go.wait()
        return 5

    def discard(result: int) -> None:
        results.append(result)
        discarded.set()

    future = in_thread(call, name="abandoned", discard=discard)
    future.cancel()
    go.set()
    async with asyncio.timeout(10):
        await discarded.wait()
    assert results == [5]


async def test_an_abandoned_call_that_fails_is_not_discarded() -> None:
    go = threading.Event()
    discarded: list[int] = []

    def call() -> int:
        go.wait()
        raise OSError

    future = in_thread(call, name="abandoned", discard=discarded.append)
    future.cancel()
    go.set()
    assert await in_thread(lambda: 1, name="later") == 1
    assert discarded == []


def test_a_call_that_outlives_the_loop_disturbs_nobody() -> None:
    go, done = threading.Event(), threading.Event()

    def call() -> None:
        go.wait()
        done.set()

    async def start() -> threading.Thread:
        in_thread(call, name="outlives")
        return next(thread for thread in threading.enumerate() if thread.name == "outlives")

    thread = asyncio.run(start())
    go.set()
    thread.join(10)
    assert done.is_set()
    assert not thread.is_alive()
