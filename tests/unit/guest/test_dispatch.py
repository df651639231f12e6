"""From a request to its reply, with a small topic of our own: who may do what, and what is said about it."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ballast.guest.dispatch import Table, command
from ballast.wire.errors import BadRequest, KernelFailure
from ballast.wire.message import Failure, Reply


@dataclass(frozen=True, slots=True)
class Stranger:
    """A peer without a token."""

    origin: str = "vsock:2:5000"
    authenticated: bool = False


@dataclass(frozen=True, slots=True)
class Friend:
    """A peer with one."""

    origin: str = "unix"
    authenticated: bool = True


@dataclass(frozen=True, slots=True)
class Item:
    """A record as an argument."""

    item_size: int
    name: str | None = None


class Topic:
    """One command of each kind."""

    @command("echo", while_frozen=True, unauthenticated=True)
    async def echo(
        self,
        *,
        number: int = 0,
        text: str = "",
        flag: bool = False,
        items: list[Item] | None = None,
        zone_name: Literal["a", "b"] = "a",
    ) -> dict[str, Any]:
        return {"number": number, "text": text, "flag": flag, "items": items or [], "zone-name": zone_name}

    @command("need", unauthenticated=True)
    async def need(self, *, wanted: int) -> int:
        return wanted

    @command("who")
    async def who(self, peer: Friend) -> str:
        return peer.origin

    @command("change", audited=True)
    async def change(self, *, how: Literal["well", "ill", "broken"]) -> None:
        if how == "ill":
            raise KernelFailure.of("change", "/it", OSError(5, "Input/output error"))
        if how == "broken":
            raise ZeroDivisionError

    @command("sync", delimited=True)
    async def sync(self) -> int:
        return 1

    async def no_command(self) -> None:
        """Has no mark."""


def make_table(*, frozen: bool = False, allow: Iterable[str] = (), block: Iterable[str] = ()) -> Table:
    """The topic's table."""
    table = Table(is_frozen=lambda: frozen, allow=allow, block=block)
    table.add(Topic())
    return table


async def failure(table: Table, name: str, peer: Any = Friend(), /, **arguments: Any) -> dict[str, Any]:
    """The error that a request gets, as on the wire."""
    answer = await table.answer({"execute": name, "arguments": arguments}, peer)
    assert isinstance(answer, Failure)
    return {"class": answer.error.wire_class, "desc": answer.error.desc, "reason": answer.error.reason}


@pytest.mark.parametrize(
    ("name", "arguments", "desc"),
    [
        ("echo", {"number": "1"}, "Invalid parameter type for 'number', expected: integer"),
        ("echo", {"number": 1.0}, "Invalid parameter type for 'number', expected: integer"),
        ("echo", {"number": True}, "Invalid parameter type for 'number', expected: integer"),
        ("echo", {"number": 1 << 63}, "Invalid parameter type for 'number', expected: integer"),
        ("echo", {"number": None}, "Invalid parameter type for 'number', expected: integer"),
        ("echo", {"text": 1}, "Invalid parameter type for 'text', expected: string"),
        ("echo", {"flag": 1}, "Invalid parameter type for 'flag', expected: boolean"),
        ("echo", {"items": {}}, "Invalid parameter type for 'items', expected: array"),
        ("echo", {"items": None}, "Invalid parameter type for 'items', expected: array"),
        ("echo", {"items": [5]}, "Invalid parameter type for 'items[0]', expected: object"),
        ("echo", {"items": [{}]}, "Parameter 'items[0].item-size' is missing"),
        ("echo", {"items": [{"item-size": 1, "x": 1}]}, "Parameter 'items[0].x' is unexpected"),
        ("echo", {"zone-name": "c"}, "Parameter 'zone-name' does not accept value 'c'"),
        ("echo", {"zone_name": "a"}, "Parameter 'zone_name' is unexpected"),
        ("need", {}, "Parameter 'wanted' is missing"),
        ("who", {"peer": "me"}, "Parameter 'peer' is unexpected"),
    ],
)
async def test_wrong_arguments_are_told_in_qemu_gas_words(name: str, arguments: dict[str, Any], desc: str) -> None:
    said = await failure(make_table(), name, **arguments)
    assert said == {"class": "GenericError", "desc": desc, "reason": "bad-argument"}


@pytest.mark.parametrize("value", [5, None, [], "text", {}, {"execute": 5}, {"execute": "echo", "arguments": []}])
async def test_what_is_no_request_is_a_bad_argument(value: Any) -> None:
    answer = await make_table().answer(value, Friend())
    assert isinstance(answer, Failure)
    assert answer.error.reason == "bad-argument"


async def test_what_the_decoder_refused_is_answered_in_its_words() -> None:
    error = BadRequest("JSON parse error, invalid keyword 'nope'")
    assert await make_table().answer(error, Friend()) == Failure(error, {})


@settings(max_examples=50)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(["execute", "arguments", "id", "x"]), inner),
        max_leaves=8,
    )
)
async def test_every_value_gets_an_answer_that_can_be_sent(value: Any) -> None:
    answer = await make_table().answer(value, Friend())
    assert answer.encode().endswith(b"\n")


async def test_arguments_reach_the_method_and_the_id_comes_back() -> None:
    arguments = {"number": -5, "text": "é", "flag": True, "items": [{"item-size": 3}], "zone-name": "b"}
    answer = await make_table().answer({"execute": "echo", "arguments": arguments, "id": [1]}, Stranger())
    assert answer == Reply(arguments, {"id": [1]})


async def test_a_command_may_see_its_peer_and_nothing_is_an_empty_object() -> None:
    table = make_table()
    assert await table.answer({"execute": "who"}, Friend()) == Reply("unix", {})
    assert await table.answer({"execute": "sync"}, Friend()) == Reply(1, {}, delimited=True)


async def test_only_marked_methods_are_commands() -> None:
    table = make_table()
    assert table.names == ["change", "echo", "need", "sync", "who"]
    assert await failure(table, "no_command") == {
        "class": "CommandNotFound",
        "desc": "The command no_command has not been found",
        "reason": "not-supported",
    }


DISABLED = {"class": "CommandNotFound", "desc": "Command need has been disabled: the command is not allowed"}


async def test_while_frozen_only_what_touches_no_disk_runs() -> None:
    table = make_table(frozen=True)
    assert await failure(table, "need", wanted=1) == DISABLED | {"reason": "frozen"}
    assert not table.is_allowed("need")
    assert table.is_allowed("echo")
    assert isinstance(await table.answer({"execute": "echo"}, Friend()), Reply)


@pytest.mark.parametrize(
    ("allow", "block", "allowed"),
    [
        ((), (), True),
        (("need",), (), True),
        (("echo",), (), False),
        ((), ("need",), False),
        (("need",), ("need",), False),
        ((), ("echo",), True),
        (("no-such",), (), False),
    ],
)
async def test_block_wins_over_allow(allow: tuple[str, ...], block: tuple[str, ...], *, allowed: bool) -> None:
    table = make_table(allow=allow, block=block)
    assert table.is_allowed("need") == allowed
    if allowed:
        assert await table.answer({"execute": "need", "arguments": {"wanted": 1}}, Friend()) == Reply(1, {})
    else:
        assert await failure(table, "need", wanted=1) == DISABLED | {"reason": "refused-by-policy"}


async def test_without_a_token_only_the_handshake_is_open() -> None:
    table = make_table()
    said = await failure(table, "who", Stranger())
    assert (said["class"], said["reason"]) == ("GenericError", "unauthenticated")
    assert isinstance(await table.answer({"execute": "echo"}, Stranger()), Reply)


async def test_a_stranger_learns_of_its_missing_token_before_its_arguments_are_looked_at() -> None:
    assert (await failure(make_table(), "change", Stranger(), no="such"))["reason"] == "unauthenticated"


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("well", "unix ran change: done, "),
        ("ill", "unix ran change: failed to change /it: Input/output error, "),
        ("none of these", "unix ran change: Parameter 'how' does not accept value 'none of these', "),
    ],
)
async def test_what_changes_something_leaves_one_line(caplog: pytest.LogCaptureFixture, how: str, told: str) -> None:
    caplog.set_level(logging.INFO)
    await make_table().answer({"execute": "change", "arguments": {"how": how}}, Friend())
    (line,) = [record.getMessage() for record in caplog.records if record.name == "ballast.guest.dispatch"]
    assert line.startswith(told)
    assert line.endswith(" ms")


async def test_what_changes_nothing_leaves_no_line(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    await make_table().answer({"execute": "who"}, Friend())
    await make_table().answer({"execute": "who"}, Stranger())
    assert not [record for record in caplog.records if record.name == "ballast.guest.dispatch"]


async def test_a_bug_is_a_short_answer_and_one_traceback(caplog: pytest.LogCaptureFixture) -> None:
    said = await failure(make_table(), "change", how="broken")
    assert said == {"class": "GenericError", "desc": "internal error, see the guest's journal", "reason": ""}
    tracebacks = [record for record in caplog.records if record.exc_info]
    assert len(tracebacks) == 1
    assert tracebacks[0].getMessage() == "command change failed"
