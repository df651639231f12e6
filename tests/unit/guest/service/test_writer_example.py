"""The service that docs/dbus.md shows, as it stands there, with the stock library."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from ballast.guest.quiesce.writer import Writer
from tests.unit.guest.private_bus import DEADLINE_S, PrivateBus
from tests.unit.guest.service.test_dbus import Shown

PAGE = Path(__file__).parents[4] / "docs/dbus.md"
START_S = 60  # for a machine that is busy with guests

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


@asynccontextmanager
async def agent(bus: PrivateBus) -> AsyncIterator[Shown]:
    """An agent on that bus, which stays."""
    shown = Shown(bus)
    task = asyncio.create_task(shown.dbus.run())
    try:
        await bus.wait_name()
        yield shown
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def registered(shown: Shown) -> Writer:
    """The service, when it is there."""
    async with asyncio.timeout(START_S):
        while not (writers := shown.services.writers()):  # noqa: ASYNC110 - nobody tells of it
            await asyncio.sleep(0.01)
    return writers[0]


async def test_the_page_s_service_registers_takes_part_and_registers_again(tmp_path: Path) -> None:
    bus = PrivateBus(tmp_path)
    (tmp_path / "shop.py").write_text(PAGE.read_text().partition("```python\n")[2].partition("```")[0])
    environment = os.environ | {"DBUS_SYSTEM_BUS_ADDRESS": f"unix:path={bus.path}"}
    try:
        async with agent(bus) as first:
            shop = await asyncio.create_subprocess_exec(
                sys.executable, "-B", str(tmp_path / "shop.py"), env=environment, stdout=asyncio.subprocess.PIPE
            )
            writer = await registered(first)
            description = await writer.start("x", {}, timeout_s=DEADLINE_S)
            assert (description.level, description.freeze_ms) == ("front-end", 5000)
            facts = {"mountpoints": ["/"], "lease-ms": 1000}
            assert await writer.ask("prepare", timeout_s=DEADLINE_S, **facts) == {}
            assert await writer.ask("freeze", timeout_s=DEADLINE_S) == {}
            assert await writer.ask("thaw", timeout_s=DEADLINE_S) == {"held": True}
            assert await writer.ask("post", timeout_s=DEADLINE_S, held=True) == {}
        async with agent(bus) as second:
            writer = await registered(second)
            assert await writer.ask("abort", timeout_s=DEADLINE_S, reason="too slow") == {}
    finally:
        bus.stop()
    async with asyncio.timeout(START_S):
        said, _ = await shop.communicate()  # without a bus it ends
    assert [line for line in said.decode().splitlines() if line != "registered"] == [
        "checkpoint",
        "hold orders back",
        "take orders",
        "the snapshot is good",
        "take orders: too slow",
    ]
