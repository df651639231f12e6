"""The codec: bad input first, then what holds for any input and any split of it."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ballast.wire.errors import AgentError, BadRequest, Busy, CommandNotFound, KernelFailure
from ballast.wire.message import Decoder, Event, Failure, Reply, Request, echo_of, parse_answer

STRAY = "JSON parse error, stray '\ufffd'"


PING = {"execute": "guest-ping", "arguments": {}, "id": 7}
PING_LINE = Request("guest-ping", {}, {"id": 7}).encode()


def decode(*chunks: bytes, limit_bytes: int = 1 << 20) -> list[Any]:
    """All values of a stream; a BadRequest as its text."""
    decoder = Decoder(limit_bytes)
    values = [value for chunk in chunks for value in decoder.feed(chunk)]
    return [value.desc if isinstance(value, BadRequest) else value for value in values]


@pytest.mark.parametrize(
    ("stream", "desc"),
    [
        (b"nope\n", "JSON parse error, invalid keyword 'nope'"),
        (b'{"a": nope}\n', "JSON parse error, invalid keyword 'nope'"),
        (b'{"a": NaN}\n', "JSON parse error, stray 'N'"),
        (b'{"a": 1, "a": 2}\n', "JSON parse error, duplicate key"),
        (b'{"a": \xc3\x28}\n', "JSON parse error, invalid UTF-8 sequence in string"),
        (b"}\n", "JSON parse error, expecting value"),
        (b'{"a"\n', "JSON parse error, missing : in object pair"),
        (b'"half a string\n', "JSON parse error, stray '\"'"),
        (b"[" * 200_000 + b"\n", "JSON parse error, nesting too deep"),
        (b"\xff", STRAY),
    ],
)
def test_bad_json_is_a_bad_request_in_its_place(stream: bytes, desc: str) -> None:
    values = decode(b'{"n": 1}\n' + stream + b'{"n": 2}\n')
    assert values == [{"n": 1}, desc, {"n": 2}]


def test_a_number_too_long_to_parse_is_a_bad_request() -> None:
    first, second = decode(b'{"a": ' + b"9" * 5000 + b"}\n" + b"{}\n")
    assert "digits" in first
    assert second == {}


@pytest.mark.parametrize(
    ("stream", "values"),
    [
        (b'{"a": 1}', [{"a": 1}]),
        (b'{"a": 1}{"b": 2}', [{"a": 1}, {"b": 2}]),
        (b'{"a": 1} {"b": 2}\n', [{"a": 1}, {"b": 2}]),
        (b"\n\r\n \n", []),
        (b'{"a": "}{\\"]["}\n', [{"a": '}{"]['}]),
        (b"{'a': 'it\\'s \"so\"'}\n", [{"a": 'it\'s "so"'}]),
        (b'{"a": "it\'s"}', [{"a": "it's"}]),
        (b"5\n", [5]),
        (b'["a"]\n', [["a"]]),
        (b"null\n", [None]),
        ('{"a": "größer"}\n'.encode(), [{"a": "größer"}]),
        (b'{"half": \xff{"a": 1}\n', [STRAY, {"a": 1}]),
        (b'{"half": "\n{"a": 1}\n', ["JSON parse error, stray '\"'", {"a": 1}]),
    ],
)
def test_messages_end_at_newlines_delimiters_and_brackets(stream: bytes, values: list[Any]) -> None:
    assert decode(stream) == values


@pytest.mark.parametrize("end", [b"\n", b"\xff"])
@pytest.mark.parametrize("long", [b'{"a": "' + b"x" * 100 + b'"}', b"x" * 1000, b"{" * 65, b'{"a": ' + b" " * 64])
def test_an_overlong_line_is_refused_once_and_the_stream_stays_in_step(long: bytes, end: bytes) -> None:
    values = decode(long[:50], long[50:], long + end, b'{"a": 1}\n', limit_bytes=64)
    assert values == ["request is longer than 64 bytes"] + [STRAY] * (end == b"\xff") + [{"a": 1}]


def test_a_line_of_exactly_the_limit_is_read() -> None:
    line = b'{"a": "' + b"x" * 55 + b'"}'
    assert len(line) == 64
    assert decode(line + b"\n", limit_bytes=64) == [{"a": "x" * 55}]
    assert decode(line + b" \n", limit_bytes=64) == [{"a": "x" * 55}]


def test_what_is_held_stays_bounded() -> None:
    decoder = Decoder(64)
    for _ in range(1000):
        list(decoder.feed(b"x" * 63))
        assert len(decoder._pending) <= 64 + 63


@pytest.mark.parametrize("char", [b"\\", b"'", b"[", b"}", b" ", b"x"])
def test_a_line_that_comes_byte_by_byte_is_looked_at_once(char: bytes) -> None:
    """Looking back at what is pending with each byte would take minutes, and run into the room's time limit."""
    decoder = Decoder()
    for _ in range(200_000):
        list(decoder.feed(char))
    assert list(decoder.feed(b"\n" + PING_LINE))[-1] == PING


# Fragments that matter to the decoder, so that random streams of them reach its corners.
FRAGMENTS = st.sampled_from(
    [bytes([char]) for char in b"{}[]\"'\\\n\xff :,1a\xc3\xa4"]
    + [b'{"execute": "guest-ping"}', b"{'a': 1}", b"null", b"x" * 40]
)
STREAMS = st.one_of(st.lists(FRAGMENTS, max_size=60).map(b"".join), st.binary(max_size=200))
LIMITS = st.sampled_from([16, 64, 1 << 20])


@given(stream=STREAMS, cuts=st.lists(st.integers(0, 400), max_size=20), limit_bytes=LIMITS)
def test_any_split_gives_the_same_values(stream: bytes, cuts: list[int], limit_bytes: int) -> None:
    places = sorted({0, len(stream), *(cut for cut in cuts if cut < len(stream))})
    chunks = [stream[start:end] for start, end in pairwise(places)]
    assert decode(*chunks, limit_bytes=limit_bytes) == decode(stream, limit_bytes=limit_bytes)


@given(stream=STREAMS, limit_bytes=LIMITS)
def test_byte_by_byte_gives_the_same_values(stream: bytes, limit_bytes: int) -> None:
    chunks = [stream[i : i + 1] for i in range(len(stream))]
    assert decode(*chunks, limit_bytes=limit_bytes) == decode(stream, limit_bytes=limit_bytes)


@given(garbage=STREAMS, end=st.sampled_from([b"\n", b"\xff"]), limit_bytes=st.sampled_from([64, 1 << 20]))
def test_after_any_garbage_a_good_request_is_read(garbage: bytes, end: bytes, limit_bytes: int) -> None:
    values = decode(garbage, end, PING_LINE, limit_bytes=limit_bytes)
    assert values[-1] == PING


@given(garbage=STREAMS)
def test_every_value_is_json_or_a_bad_request(garbage: bytes) -> None:
    for value in Decoder().feed(garbage + b"\n"):
        if not isinstance(value, BadRequest):
            json.dumps(value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
).filter(lambda value: value not in (float("inf"), float("-inf")))
FINITE = JSON.filter(lambda value: "Infinity" not in json.dumps(value))


@given(values=st.lists(st.dictionaries(st.text(max_size=8), FINITE, max_size=4), max_size=5), newline=st.booleans())
def test_objects_back_to_back_are_read_with_and_without_newlines(values: list[Any], newline: bool) -> None:
    assert decode(b"".join(json.dumps(v).encode() + b"\n" * newline for v in values)) == values


@given(name=st.text(max_size=20), arguments=st.dictionaries(st.text(max_size=8), FINITE, max_size=4), echo=FINITE)
def test_requests_come_back_as_they_were(name: str, arguments: dict[str, Any], echo: Any) -> None:
    request = Request(name, arguments, {"id": echo})
    (value,) = decode(request.encode())
    assert Request.parse(value) == request


@given(value=FINITE, echo=FINITE, delimited=st.booleans())
def test_replies_come_back_as_they_were(value: Any, echo: Any, delimited: bool) -> None:
    line = Reply(value, {"id": echo}, delimited=delimited).encode()
    assert line.startswith(b"\xff") == delimited
    assert parse_answer(decode(line)[-1]) == Reply(value, {"id": echo})


@given(
    data=st.dictionaries(st.text(max_size=8), FINITE, max_size=4),
    seq=st.integers(0, 2**53),
    timestamp_us=st.integers(0, 2**53),
)
def test_events_come_back_as_they_were(data: dict[str, Any], seq: int, timestamp_us: int) -> None:
    event = Event("BALLAST_PRESSURE", data, seq, timestamp_us)
    assert parse_answer(decode(event.encode())[0]) == event


EVENT_LIKE = st.fixed_dictionaries({}, optional=dict.fromkeys(("event", "data", "seq", "timestamp"), FINITE))


@given(value=FINITE | EVENT_LIKE)
def test_any_answer_is_read_or_refused(value: Any) -> None:
    try:
        parse_answer(value)
    except BadRequest:
        return


@pytest.mark.parametrize(
    ("value", "desc"),
    [
        (5, "QMP input must be a JSON object"),
        ([], "QMP input must be a JSON object"),
        (None, "QMP input must be a JSON object"),
        ({}, "QMP input lacks member 'execute'"),
        ({"arguments": {}}, "QMP input lacks member 'execute'"),
        ({"execute": 5}, "QMP input member 'execute' must be a string"),
        ({"execute": "x", "arguments": []}, "QMP input member 'arguments' must be an object"),
        ({"execute": "x", "foo": 1}, "QMP input member 'foo' is unexpected"),
        ({"exec-oob": "guest-ping"}, "QMP input member 'exec-oob' is unexpected"),
    ],
)
def test_bad_requests_are_told_in_qemus_words(value: Any, desc: str) -> None:
    with pytest.raises(BadRequest) as caught:
        Request.parse(value)
    assert caught.value.desc == desc


@pytest.mark.parametrize("name", [None, 0, "", "x", [1], {"a": 1}, 1.5, False])
def test_any_id_is_echoed(name: Any) -> None:
    request = Request.parse({"execute": "guest-ping", "id": name})
    assert json.loads(Reply({}, request.echo).encode())["id"] == name
    assert echo_of({"foo": 1, "id": name}) == {"id": name}
    assert echo_of([name]) == {}


def test_a_failure_carries_class_text_reason_and_data() -> None:
    line = Failure(Busy("held by a", id="a", left_ms=5), {"id": 1}).encode()
    assert json.loads(line) == {
        "error": {"class": "GenericError", "desc": "held by a", "data": {"reason": "busy", "id": "a", "left_ms": 5}},
        "id": 1,
    }
    failure = parse_answer(json.loads(line))
    assert isinstance(failure, Failure)
    assert isinstance(failure.error, Busy)
    assert failure.error.data == {"id": "a", "left_ms": 5}


@pytest.mark.parametrize(
    ("error", "kind", "desc"),
    [
        ({"class": "GenericError", "desc": "no"}, AgentError, "no"),
        ({"class": "CommandNotFound", "desc": "no"}, CommandNotFound, "no"),
        ({"class": "FromTheFuture", "desc": "no", "data": {"reason": "phase-of-moon"}}, AgentError, "no"),
        ({"class": "GenericError", "desc": "no", "data": "text"}, AgentError, "no"),
        ({"class": "GenericError", "desc": "no", "data": {"desc": "x", "self": 1, "reason": "busy"}}, Busy, "no"),
        ({"class": "GenericError", "desc": "no", "data": {"reason": "kernel", "errno": 16}}, KernelFailure, "no"),
        ({}, AgentError, "None"),
    ],
)
def test_errors_of_any_peer_are_read(error: dict[str, Any], kind: type[AgentError], desc: str) -> None:
    failure = parse_answer({"error": error})
    assert isinstance(failure, Failure)
    assert type(failure.error) is kind
    assert failure.error.desc == desc


@pytest.mark.parametrize(
    "value",
    [
        5,
        None,
        [],
        {},
        {"error": "text"},
        {"event": 5},
        {"event": "X", "data": [1]},
        {"event": "X", "seq": "1"},
        {"execute": "guest-ping"},
    ],
)
def test_what_is_no_answer_is_refused(value: Any) -> None:
    with pytest.raises(BadRequest):
        parse_answer(value)


@pytest.mark.parametrize("stamp", [None, 5, {}, {"seconds": "1"}, {"seconds": 1e999, "microseconds": 0}])
def test_an_event_is_not_lost_for_its_time(stamp: Any) -> None:
    assert parse_answer({"event": "X", "timestamp": stamp}) == Event("X", {}, 0, 0)
