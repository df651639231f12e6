"""What all parts of the demo share: what it says on the screen, the guest, and whose clock it is."""

import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.padding import Padding
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from ballast.host.agent import Agent
from ballast.host.show import Table, put_tables
from tests.lab.guest import Guest

CLOCK_ROUND_TRIPS = 10
WIDTH_MAX = 100


class DemoFailed(Exception):
    """Something that the demo is there to show did not happen."""


def require(happened: object, what: str) -> None:
    """Raise DemoFailed unless it happened."""
    if not happened:
        raise DemoFailed(what)


class Screen:
    """Words and figures for a person; plain lines where stdout is no terminal."""

    def __init__(self) -> None:
        self._console = Console(highlight=False)
        self._started_s = time.monotonic()
        self.summary: list[tuple[str, str]] = []

    @property
    def elapsed_s(self) -> float:
        """Since the demo began."""
        return time.monotonic() - self._started_s

    def step(self, title: str) -> None:
        """Begin a chapter."""
        self._console.print(f"\n[bold cyan]{title}[/]  [dim]at {self.elapsed_s:.0f} s[/]")

    def say(self, text: str) -> None:
        """A sentence or two, broken into lines; what is [bold] in it are figures."""
        self._console.print(Padding(text, (0, 0, 0, 2), expand=False), width=min(self._console.width, WIDTH_MAX))

    def show(self, line: str) -> None:
        """A line to copy, however long."""
        self._console.print(f"    {line}", markup=False, soft_wrap=True)

    def sum_up(self, what: str, figure: str) -> None:
        """Keep a line for the table at the end."""
        self.summary.append((what, figure))

    def table(self, table: Table) -> None:
        """A table, below the lines so far."""
        self._console.print()
        put_tables([table], sys.stdout)

    @contextmanager
    def working(self, text: str) -> Iterator[None]:
        """Show that something takes its time, with the seconds so far; gone when it is done."""
        if not self._console.is_terminal:
            self.say(f"... {text}")
            yield
            return
        columns = TextColumn(" "), SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
        with Progress(*columns, console=self._console, transient=True) as progress:
            progress.add_task(text, total=None)
            yield


@dataclass(frozen=True, slots=True)
class Stage:
    """The demo's guest, a connection to its agent over vsock, and the screen."""

    guest: Guest
    agent: Agent
    screen: Screen


@dataclass(frozen=True, slots=True)
class GuestClock:
    """How far the guest's CLOCK_REALTIME is ahead of ours, and how far off that estimate may be."""

    ahead_s: float
    error_s: float

    def on_host(self, guest_s: float) -> float:
        """That moment by our clock."""
        return guest_s - self.ahead_s


def read_clock(guest: Guest) -> GuestClock:
    """Compare the clocks by the quickest of a few round trips, as NTP does."""
    return min((_compare_clocks(guest) for _ in range(CLOCK_ROUND_TRIPS)), key=lambda clock: clock.error_s)


def _compare_clocks(guest: Guest) -> GuestClock:
    # /proc/timer_list has nanoseconds since boot and each clock's offset from that; CLOCK_REALTIME's is the largest
    # (CLOCK_TAI's may be larger by the leap seconds, which a guest without NTP does not know). It takes no process,
    # which under TCG makes date(1) ten times as slow.
    asked_s = time.time()
    text = guest.get("/proc/timer_list").decode()
    answered_s = time.time()
    now = re.search(r"^now at (\d+) nsecs$", text, re.MULTILINE)
    if now is None:
        raise DemoFailed("the guest's /proc/timer_list has no time")
    offset_ns = max(int(offset) for offset in re.findall(r"\.offset: +(\d+) nsecs", text))
    guest_s = (int(now[1]) + offset_ns) / 1e9
    return GuestClock(guest_s - (asked_s + answered_s) / 2, (answered_s - asked_s) / 2)
