"""Tables: on a terminal and elsewhere, and what a guest's text can do in them, which is nothing."""

from __future__ import annotations

import io

import pytest

from ballast.host.show import Table, printable, put_tables
from ballast.host.view import event_line
from ballast.wire.message import Event

TABLES = [
    Table("first", [("state", "frozen"), ("name of a thing", "[red]x[/red]\x1b[2J")]),
    Table("second", [("/data", "failed")], ("MOUNT POINT", "STATE")),
    Table("nothing", []),
]


class Terminal(io.StringIO):
    """What says that it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_elsewhere_tables_are_aligned_text() -> None:
    out = io.StringIO()
    put_tables(TABLES, out)
    assert out.getvalue() == (
        "first\n  state            frozen\n  name of a thing  [red]x[/red]\\x1b[2J\n\n"
        "second\n  MOUNT POINT  STATE\n  /data        failed\n\n"
        "nothing\n"
    )


def test_on_a_terminal_tables_are_rich_without_markup_or_escapes_of_the_guest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setenv("COLUMNS", "80")
    out = Terminal()
    put_tables(TABLES, out)
    shown = out.getvalue()
    assert "[red]x[/red]\\x1b[2J" in shown
    assert "MOUNT POINT" in shown
    assert "\x1b[2J" not in shown


@pytest.mark.parametrize(
    ("text", "shown"),
    [("größer", "größer"), ("a\tb\n", "a\\tb\\n"), ("\u202ex", "\\u202ex"), ("\ud800", "\\ud800"), ("\x9b", "\\x9b")],
)
def test_only_printable_characters_get_out(text: str, shown: str) -> None:
    assert printable(text) == shown


@pytest.mark.parametrize("timestamp_us", [10**40, -(10**40), 0])
def test_an_event_is_shown_whatever_the_guests_clock_says(timestamp_us: int) -> None:
    line = event_line(Event("X", {"level": "low", "blocks": [1], "share": 1.5}, 1, timestamp_us))
    assert line.endswith(" X level=low blocks=[1] share=1.5")
