"""Bytes <-> messages, in the QEMU guest agent's JSON: one object a line.

A message ends at a newline, at the 0xFF of ``guest-sync-delimited``, or where its brackets close, whichever comes
first: requests without a newline and objects back to back are read, as qemu-ga reads them. Unlike qemu-ga, a newline
*always* ends a message, so that no input leaves the stream out of step.
Texts of errors are qemu-ga 10.0's (qapi/qmp-dispatch.c, qobject/json-parser.c); only where it names a token as stray
do we name the first character that is wrong.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from ballast.wire.errors import AgentError, BadRequest, from_wire

LINE_LIMIT_BYTES = 1 << 20
DELIMITER = b"\xff"

_SEPARATOR = re.compile(rb"[\n\xff]")
_STRUCTURE = re.compile(rb"\\.|[\"'{}\[\]]", re.DOTALL)
_QUOTED = re.compile(r"\"(?:\\.|[^\"\\])*\"|'(?:\\.|[^'\\])*'")
_KEYWORD = re.compile(r"[a-z]+")
# Of the module json, by how its message begins. The rest of them depend on what stands at the place of the error.
_TEXTS = {
    "Expecting ':'": "missing : in object pair",
    "Expecting ','": "expected separator in dict",
    "Invalid \\": "invalid escape sequence in string",
}


class Decoder:
    """Cut a byte stream into JSON values; what is no JSON comes out as a BadRequest in its place.

    The result does not depend on how the stream is split into chunks. Holds at most ``limit_bytes`` plus one chunk.
    """

    def __init__(self, limit_bytes: int = LINE_LIMIT_BYTES) -> None:
        self._limit_bytes = limit_bytes
        self._pending = bytearray()
        self._skipping = False
        self._restart_scan()

    def feed(self, data: bytes) -> Iterator[Any | BadRequest]:
        """Take a chunk and yield each value that it completes."""
        start = 0
        for separator in _SEPARATOR.finditer(data):
            self._pending += data[start : separator.start()]
            start = separator.end()
            yield from self._end_of_line(delimited=separator.group() == DELIMITER)
        self._pending += data[start:]
        yield from self._complete_messages()

    def _end_of_line(self, *, delimited: bool) -> Iterator[Any | BadRequest]:
        line = bytes(self._pending)
        if not self._skipping and len(line) <= self._limit_bytes:
            value = _parse(line)
            if isinstance(value, dict):  # nearly every line: one whole object
                self._pending.clear()
                yield value
        if self._pending:
            self._restart_scan()
            yield from self._complete_messages()
            if not delimited and not self._skipping and self._pending.strip():
                yield _parse(bytes(self._pending))
        if delimited:
            yield BadRequest("JSON parse error, stray '\ufffd'")
        self._pending.clear()
        self._skipping = False
        self._restart_scan()

    def _restart_scan(self) -> None:
        self._scanned = 0
        self._depth = 0
        self._quote = b""

    def _complete_messages(self) -> Iterator[Any | BadRequest]:
        """Cut off and yield what is complete without a newline; remember how far the rest was looked at."""
        while not self._skipping and (end := self._scan()):
            message = bytes(self._pending[:end])
            del self._pending[:end]
            self._restart_scan()
            if end > self._limit_bytes:
                yield from self._skip_line()
            else:
                yield _parse(message)
        if not self._skipping and len(self._pending) > self._limit_bytes:
            yield from self._skip_line()
        if self._skipping:
            self._pending.clear()

    def _skip_line(self) -> Iterator[BadRequest]:
        self._skipping = True
        self._pending.clear()
        limit = {"limit-bytes": self._limit_bytes}
        yield BadRequest(f"request is longer than {self._limit_bytes} bytes", **limit)

    def _scan(self) -> int:
        """Return where the first message ends, or 0; each byte is looked at once."""
        looked_at = self._scanned
        for token in _STRUCTURE.finditer(self._pending, self._scanned):
            char, looked_at = token.group(), token.end()
            if self._quote:
                if char == self._quote:
                    self._quote = b""
            elif char in (b'"', b"'"):
                self._quote = char
            elif char in (b"{", b"["):
                self._depth += 1
            elif char in (b"}", b"]"):
                self._depth -= 1
                if self._depth <= 0:
                    return token.end()
        # A backslash at the very end is half a token: look at it again when the next byte is there.
        half = looked_at < len(self._pending) and self._pending.endswith(b"\\")
        self._scanned = len(self._pending) - (1 if half else 0)
        return 0


def _parse(message: bytes) -> Any | BadRequest:
    """Parse one message; a BadRequest is returned, not raised, since it takes the message's place in the stream."""
    try:
        text = message.decode()
    except UnicodeDecodeError:
        return BadRequest("JSON parse error, invalid UTF-8 sequence in string")
    try:
        return _loads(text)
    except (ValueError, RecursionError) as error:
        problem = error
    if "'" in text:
        text = _QUOTED.sub(_double_quoted, text)
        try:
            return _loads(text)
        except (ValueError, RecursionError) as error:
            problem = error
    return BadRequest(f"JSON parse error, {_describe(text, problem)}")


def _loads(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("duplicate key")
    return result


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"stray '{name[0]}'")


def _double_quoted(token: re.Match[str]) -> str:
    """Rewrite QEMU's 'single-quoted' strings, an extension that its own tools use."""
    text = token.group()
    if text[0] == '"':
        return text
    return '"' + text[1:-1].replace("\\'", "'").replace('"', '\\"') + '"'


def _describe(text: str, problem: Exception) -> str:
    if isinstance(problem, RecursionError):
        return "nesting too deep"
    if not isinstance(problem, json.JSONDecodeError):
        return str(problem)
    for beginning, own in _TEXTS.items():
        if problem.msg.startswith(beginning):
            return own
    found = text[problem.pos : problem.pos + 1]
    if word := _KEYWORD.match(text, problem.pos):
        return f"invalid keyword '{word.group()}'"
    if problem.msg.startswith("Expecting property name") and found.isdigit():
        return "key is not a string in object"
    return "expecting value" if found in tuple("{}[],:") or not found else f"stray '{found}'"


@dataclass(frozen=True, slots=True)
class Request:
    """A command to run. ``echo`` is what the reply repeats: {"id": ...}, or nothing."""

    execute: str
    arguments: dict[str, Any] = field(default_factory=dict)
    echo: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, value: Any) -> Request:
        """Check a decoded value; raise BadRequest in qemu-ga's words (``qmp_dispatch_check_obj``)."""
        if not isinstance(value, dict):
            raise BadRequest("QMP input must be a JSON object")
        for name, item in value.items():
            if name == "execute" and not isinstance(item, str):
                raise BadRequest("QMP input member 'execute' must be a string")
            if name == "arguments" and not isinstance(item, dict):
                raise BadRequest("QMP input member 'arguments' must be an object")
            if name not in ("execute", "arguments", "id"):
                raise BadRequest(f"QMP input member '{name}' is unexpected")
        if "execute" not in value:
            raise BadRequest("QMP input lacks member 'execute'")
        return cls(value["execute"], value.get("arguments", {}), echo_of(value))

    def encode(self) -> bytes:
        """One line."""
        return _line({"execute": self.execute, "arguments": self.arguments} | self.echo)


def echo_of(value: Any) -> dict[str, Any]:
    """What a reply to ``value`` must repeat, even where ``value`` is no proper request."""
    return {"id": value["id"]} if isinstance(value, dict) and "id" in value else {}


@dataclass(frozen=True, slots=True)
class Reply:
    """A command's result, as JSON values."""

    value: Any
    echo: dict[str, Any] = field(default_factory=dict)
    delimited: bool = False

    def encode(self) -> bytes:
        """One line, behind an 0xFF where the command asked for it."""
        return (DELIMITER if self.delimited else b"") + _line({"return": self.value} | self.echo)


@dataclass(frozen=True, slots=True)
class Failure:
    """A command's error."""

    error: AgentError
    echo: dict[str, Any] = field(default_factory=dict)

    def encode(self) -> bytes:
        """One line; ``data`` is ours, qemu-ga's clients ignore it."""
        error = self.error
        data = {"reason": error.reason} | error.data if error.reason else error.data
        return _line({"error": {"class": error.wire_class, "desc": error.desc, "data": data}} | self.echo)


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened; ``seq`` counts up by one for each subscriber, ``timestamp_us`` since the epoch."""

    name: str
    data: dict[str, Any]
    seq: int
    timestamp_us: int

    def encode(self) -> bytes:
        """One line."""
        seconds, microseconds = divmod(self.timestamp_us, 1_000_000)
        stamp = {"seconds": seconds, "microseconds": microseconds}
        return _line({"event": self.name, "data": self.data, "seq": self.seq, "timestamp": stamp})


def parse_answer(value: Any) -> Reply | Failure | Event:
    """What the host reads: a reply, an error or an event; raise BadRequest for anything else."""
    if isinstance(value, dict):
        if "return" in value:
            return Reply(value["return"], echo_of(value))
        if isinstance(error := value.get("error"), dict):
            data = error.get("data")
            known = from_wire(
                str(error.get("class")), str(error.get("desc")), dict(data) if isinstance(data, dict) else {}
            )
            return Failure(known, echo_of(value))
        if isinstance(value.get("event"), str):
            data, seq = value.get("data", {}), value.get("seq", 0)
            if isinstance(data, dict) and isinstance(seq, int):
                return Event(value["event"], data, seq, _timestamp_us(value.get("timestamp")))
    raise BadRequest("the agent sent something that is neither a reply nor an event")


def _timestamp_us(stamp: Any) -> int:
    """Read QMP's ``{"seconds", "microseconds"}``; 0 for anything else, since no event is worth losing for its time."""
    if not isinstance(stamp, dict):
        return 0
    seconds, microseconds = stamp.get("seconds"), stamp.get("microseconds")
    return seconds * 1_000_000 + microseconds if isinstance(seconds, int) and isinstance(microseconds, int) else 0


def _line(value: dict[str, Any]) -> bytes:
    return json.dumps(value).encode() + b"\n"
