"""docs/protocol.md says what is built: its tables against the code that they tell of."""

from __future__ import annotations

import dataclasses
import inspect
import re
import typing
from pathlib import Path
from typing import Any

import pytest

from ballast.guest.commands.agent import AgentCommands
from ballast.guest.commands.memory import MemoryCommands
from ballast.guest.commands.quiesce import QuiesceCommands
from ballast.guest.events import NAMES
from ballast.wire import errors, memory_names, names
from ballast.wire.shape import wire_name

PAGE = (Path(__file__).parents[3] / "docs/protocol.md").read_text()
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.splitlines() if line.startswith("| ")]
CLASSES = ("GenericError", "CommandNotFound")
COMMANDS: dict[str, Any] = {
    method._ballast_command.name: method
    for topic in (AgentCommands, MemoryCommands, QuiesceCommands)
    for _, method in inspect.getmembers(topic, inspect.isfunction)
    if hasattr(method, "_ballast_command")
}


def rows_of(pattern: str) -> dict[str, list[str]]:
    """Rows whose first cell matches, by what matched."""
    return {match[1]: row[1:] for row in ROWS if (match := re.fullmatch(pattern, row[0]))}


def test_the_table_names_every_command() -> None:
    assert rows_of(r"`((?:guest|ballast)-[a-z-]+)`").keys() == COMMANDS.keys()


@pytest.mark.parametrize("name", COMMANDS)
def test_the_table_says_what_a_command_takes_and_when_it_runs(name: str) -> None:
    arguments, *_, no_token, frozen = rows_of(r"`((?:guest|ballast)-[a-z-]+)`")[name]
    marks = COMMANDS[name]._ballast_command
    assert (no_token == "yes", frozen == "yes") == (marks.unauthenticated, marks.while_frozen)
    told = set(re.findall(r"(?:^|, | or )([a-z-]+)\??(?=[:,]|$)", re.sub(r"\{[^}]*\}|\"[^\"]*\"", "", arguments)))
    keywords = inspect.signature(COMMANDS[name]).parameters.values()
    assert told == {wire_name(p.name) for p in keywords if p.kind is inspect.Parameter.KEYWORD_ONLY}


def test_the_list_of_reasons_is_the_code_s() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.AgentError)]
    told = {name: row for name, row in rows_of(r"`([a-z-]+)`").items() if row[0].split(";")[0] in CLASSES}
    assert told.keys() == {kind.reason for kind in kinds} - {""}
    for kind in kinds:
        if kind.reason:
            assert kind.wire_class in told[kind.reason][0]


RECORDS = rows_of(r"([A-Z][a-zA-Z]+)")


@pytest.mark.parametrize("name", RECORDS)
def test_the_records_have_the_fields_that_are_told(name: str) -> None:
    told = RECORDS[name][0]
    while told != (told := re.sub(r"\{[^{}]*\}|\[[^][]*\]|\"[^\"]*\"", "", told)):
        pass  # from the inside out
    fields = {wire_name(field.name) for field in dataclasses.fields((vars(names) | vars(memory_names))[name])}
    assert fields == set(re.findall(r"(?:^|, )([a-z-]+)\??(?=[:,]|$)", told))


def test_the_table_names_every_event() -> None:
    assert set(rows_of(r"`(BALLAST_[A-Z_]+)`")) == set(NAMES)


def test_what_changes_memory_and_why_is_told_in_full() -> None:
    for word in typing.get_args(memory_names.Change) + typing.get_args(memory_names.ChangeReason):
        assert re.search(rf"^[|-] [^|:]*`{word}`[,:| ]", PAGE.partition("### Explain")[2], re.MULTILINE), word


def test_why_a_freeze_did_not_hold_is_told_in_full() -> None:
    for reason in typing.get_args(names.EndReason):
        assert f"`{reason}`" in PAGE
