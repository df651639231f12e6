"""A fake agent for each test that asks for one."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest_asyncio

from tests.unit.host.fake import FakeAgent, serve


@pytest_asyncio.fixture
async def fake(tmp_path: Path) -> AsyncIterator[FakeAgent]:
    """Listening, and gone after the test."""
    async with serve(tmp_path / "agent.sock") as agent:
        yield agent
