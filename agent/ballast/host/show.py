"""What people see: tables by rich on a terminal, aligned text elsewhere, and words on stderr meanwhile.

Every text may come from a guest that wishes us ill: only printable characters get out, and no markup.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TextIO

from ballast.host.quantity import format_size
from ballast.wire.shape import to_wire

PATIENCE_S = 2.0
_REPEAT_S = 10.0


@dataclass(frozen=True, slots=True)
class Table:
    """A heading and rows of cells; without ``columns`` each row is a name and a value."""

    title: str
    rows: Sequence[tuple[str, ...]]
    columns: tuple[str, ...] = ()


def printable(text: str) -> str:
    """Escape what could steer a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def say(text: str) -> None:
    """One line for a person, beside the output."""
    sys.stderr.write(f"ballastctl: {printable(text)}\n")
    sys.stderr.flush()


def put_line(text: str) -> None:
    """One line of output."""
    sys.stdout.write(printable(text) + "\n")
    sys.stdout.flush()


def put_json(record: Any) -> None:
    """One record as one line for programs, with the names of the wire."""
    put_line(json.dumps(to_wire(record)))


def put_tables(tables: Sequence[Table], out: TextIO | None = None) -> None:
    """Tables for a person."""
    out = out or sys.stdout
    if out.isatty():
        _put_rich(tables, out)
    else:
        out.write("\n\n".join(format_plain(table) for table in tables) + "\n")
    out.flush()


def format_plain(table: Table) -> str:
    """Columns held apart by spaces."""
    rows = [
        tuple(printable(cell) for cell in row) for row in ([table.columns] if table.columns else []) + [*table.rows]
    ]
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = [" ".join(f"{cell:<{width + 1}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([printable(table.title), *("  " + line for line in lines)])


def _put_rich(tables: Sequence[Table], out: TextIO) -> None:
    # Imported here: nothing else needs it, and programs that read our output do not wait for it.
    from rich import box
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    console = Console(file=out, highlight=False)
    for table in tables:
        rich_table = RichTable(
            title=Text(printable(table.title), style="bold"),
            title_justify="left",
            box=box.SIMPLE_HEAD,
            show_header=bool(table.columns),
        )
        for column in table.columns or ("", ""):
            rich_table.add_column(column, overflow="fold")
        for row in table.rows:
            rich_table.add_row(*(Text(printable(cell), style=_style(cell)) for cell in row))
        console.print(rich_table)


def _style(cell: str) -> str:
    if cell in ("failed", "critical", "timed-out", "did not hold"):
        return "red"
    if cell in ("freezing", "medium", "frozen"):
        return "yellow"
    return "green" if cell in ("done", "held", "low", "thawed") else ""


@contextlib.contextmanager
def progress_bar(what: str, total_bytes: int) -> Iterator[Callable[[int], None]]:
    """A bar on stderr, if it takes its time; elsewhere than on a terminal a line now and then. Yields ``advance``."""
    done_bytes = 0

    def tell() -> str:
        return f"{what}, {format_size(done_bytes)} of {format_size(total_bytes)}"

    def advance(bytes_: int) -> None:
        nonlocal done_bytes
        done_bytes += bytes_

    if sys.stderr.isatty():
        with _rich_bar(what, total_bytes) as advance_bar:
            yield advance_bar
    else:
        with progress(tell):
            yield advance


@contextlib.contextmanager
def _rich_bar(what: str, total_bytes: int) -> Iterator[Callable[[int], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(printable(what)), BarColumn(), DownloadColumn(binary_units=True), TimeRemainingColumn())
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    task = bar.add_task(what, total=total_bytes)
    timer = asyncio.get_running_loop().call_later(PATIENCE_S, bar.start)
    try:
        yield lambda bytes_: bar.advance(task, bytes_)
    finally:
        timer.cancel()
        bar.stop()


@contextlib.contextmanager
def progress(what: str | Callable[[], str]) -> Iterator[None]:
    """Say on stderr that ``what`` takes its time, if it does."""
    loop = asyncio.get_running_loop()
    started_s = loop.time()
    timer: asyncio.TimerHandle

    def tell() -> None:
        nonlocal timer
        text = what if isinstance(what, str) else what()
        say(f"{text}, {loop.time() - started_s:.0f} s so far")
        timer = loop.call_later(_REPEAT_S, tell)

    timer = loop.call_later(PATIENCE_S, tell)
    try:
        yield
    finally:
        timer.cancel()
