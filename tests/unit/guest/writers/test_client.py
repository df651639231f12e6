"""A session through a client program; the shell stands in for a database's own, and its commands for statements."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ballast.guest.writers.client import Client
from ballast.guest.writers.program import Request, WriterError


def request(deadline_ms: int = 10_000) -> Request:
    return Request({"verb": "freeze", "deadline-ms": deadline_ms})


@pytest.fixture
def client() -> Iterator[Client]:
    client = Client(["sh", "-e"], "echo {}", {"GREETING": "hello"})
    yield client
    client.close()


def test_rows_are_lines(client: Client) -> None:
    assert client.ask(request(), "echo $GREETING; echo a b") == ["hello", "a b"]


def test_what_says_nothing_has_no_rows(client: Client) -> None:
    assert client.ask(request(), "true") == []


def test_a_session_remembers(client: Client) -> None:
    client.ask(request(), "lock=held")
    assert client.ask(request(), "echo $lock") == ["held"]


def test_an_error_ends_the_session_and_says_why(client: Client) -> None:
    with pytest.raises(WriterError, match=r"^ERROR 1205: too late$"):
        client.ask(request(), "echo 'ERROR 1205:' >&2; echo '  too late'; exit 1")
    with pytest.raises(WriterError):
        client.ask(request(), "echo still there")


def test_a_session_that_was_lost_says_so(client: Client) -> None:
    client.ask(request(), "true")
    with pytest.raises(WriterError, match="the session with the server has ended"):
        client.ask(request(), "kill -9 $$")


def test_who_does_not_answer_in_time_is_killed(client: Client) -> None:
    pid = int(client.ask(request(), "echo $$")[0])
    with pytest.raises(WriterError, match="did not answer freeze in time"):
        client.ask(request(deadline_ms=50), "sleep 1000")
    with pytest.raises(WriterError):
        client.ask(request(), "true")
    assert client._child.returncode == -9
    assert client._child.pid == pid


def test_who_says_too_much_is_killed(client: Client) -> None:
    with pytest.raises(WriterError):
        client.ask(request(), "yes")
    assert client._child.returncode == -9


def test_a_program_that_is_missing_is_an_error_of_the_system() -> None:
    with pytest.raises(FileNotFoundError, match="no-such-client"):
        Client(["no-such-client"], "echo {}")
