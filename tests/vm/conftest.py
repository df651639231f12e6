"""One boot for many tests: a Debian 13 guest with the packages installed, and a Debian 12 one, for all of this room.

A test leaves the guest as it found it: thawed, agent and guard running, nothing of its own behind.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.lab.guest import Guest
from tests.lab.image import build

DIST = Path(__file__).parents[2] / "dist"
NEXT = DIST / "next"
DISKS = (("ext4", 512 << 20), ("xfs", 512 << 20), ("btrfs", 512 << 20))
TOKEN = secrets.token_hex(16)


def packages(folder: Path = DIST) -> list[Path]:
    """What goes into a guest, as `make packages` has built it; in NEXT is the same as a later version."""
    return [next(folder.glob(f"{name}_*.deb")) for name in ("ballast-common", "ballast-agent")]


@contextmanager
def boot(suite: str) -> Iterator[Guest]:
    """A guest of that suite with three data disks and the agent installed."""
    with Guest(build(suite), disks=DISKS, token=TOKEN) as guest:
        guest.wait_boot()
        guest.install(packages())
        yield guest


@pytest.fixture(scope="session")
def guest() -> Iterator[Guest]:
    """The shared guest."""
    with boot("trixie") as booted:
        yield booted


@pytest.fixture(scope="session")
def bookworm() -> Iterator[Guest]:
    """The shared guest of the oldest Debian that we promise."""
    with boot("bookworm") as booted:
        yield booted


@pytest.fixture(scope="session")
def token() -> str:
    """The guest's token."""
    return TOKEN


@pytest.fixture(scope="session")
def vsock(guest: Guest) -> str:
    """Connect string of the guest's vsock port."""
    return f"unix:{guest.vsock_path}?connect=640"


@pytest.fixture(scope="session")
def serial(guest: Guest) -> str:
    """Connect string of the guest's virtio-serial port."""
    return f"unix:{guest.ballast_port}"


@pytest.fixture
def measured(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Note a figure; all of them are shown at the end of the run."""
    return lambda text: request.node.user_properties.append(("measured", text))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Show what was measured, of tests that failed too."""
    reports = [report for kind in ("passed", "failed") for report in terminalreporter.stats.get(kind, ())]
    texts = [text for report in reports for name, text in report.user_properties if name == "measured"]
    if texts:
        terminalreporter.section("measured in guests")
    for text in texts:
        terminalreporter.write_line(text)
