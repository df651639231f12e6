"""The three rooms: each folder's marker and time limit; and BALLAST_REQUIRE=all, under which a skip is a failure."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Generator
from pathlib import Path
from typing import TypeVar

import pytest

Report = TypeVar("Report", pytest.TestReport, pytest.CollectReport)

sys.modules["gi"] = None  # type: ignore[assignment]  # as ballastd itself does, before dbus-next asks for it

HERE = Path(__file__).parent
# The first test of tests/vm also builds the guests' images, if the cache is cold.
ROOM_TIMEOUT_S = {"unit": 20, "kernel": 120, "vm": 900}


def pytest_configure() -> None:
    """Asyncio's debug mode warns of slow callbacks: on a busy machine every callback is slow at times."""
    logging.getLogger("asyncio").setLevel(logging.ERROR)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give each test the marker and the time limit of its room."""
    for item in items:
        room = item.path.relative_to(HERE).parts[0]
        if room in {"kernel", "vm"}:
            item.add_marker(room)
        if item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(ROOM_TIMEOUT_S[room]))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A test that skipped itself."""
    return _required((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """A module that skipped itself whole."""
    return _required((yield))


def _required(report: Report) -> Report:
    # An expected failure is reported as skipped too, and is none.
    if os.environ.get("BALLAST_REQUIRE") == "all" and report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        report.outcome = "failed"
        report.longrepr = f"{reason} (BALLAST_REQUIRE=all: nothing may be skipped)"
    return report
