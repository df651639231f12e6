"""From a decoded request to its reply: the command table, argument checks, the frozen gate, policy, the audit line.

A command is one method that carries ``@command(name)``. Its keyword-only parameters are the arguments, checked against
their annotations; a first parameter named ``peer`` receives the peer that asks. Only this file turns errors into
replies.
"""

from __future__ import annotations

import inspect
import logging
import time
import typing
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from ballast.wire.errors import AgentError, CommandNotFound, Frozen, Refused, Unauthenticated
from ballast.wire.message import Failure, Reply, Request, echo_of
from ballast.wire.shape import read_parameters, to_wire, wire_name

log = logging.getLogger(__name__)

_ATTRIBUTE = "_ballast_command"
F = TypeVar("F", bound=Callable[..., Awaitable[Any]])


class Caller(Protocol):
    """What dispatching needs to know of a peer."""

    @property
    def origin(self) -> str:
        """Where it comes from, for the audit line: "vsock:2:1023", "virtio-serial", "unix:0"."""

    @property
    def authenticated(self) -> bool:
        """Whether more than the handshake is open to it."""


@dataclass(frozen=True, slots=True)
class _Marks:
    name: str
    while_frozen: bool
    unauthenticated: bool
    audited: bool
    delimited: bool


@dataclass(frozen=True, slots=True)
class Command:
    """One row of the table."""

    marks: _Marks
    method: Callable[..., Awaitable[Any]]
    parameters: dict[str, tuple[str, Any, bool]]
    wants_peer: bool


def command(
    name: str,
    *,
    while_frozen: bool = False,
    unauthenticated: bool = False,
    audited: bool = False,
    delimited: bool = False,
) -> Callable[[F], F]:
    """Mark a method as the command ``name``.

    ``while_frozen``: it may run while file systems are frozen, so it touches no disk. ``unauthenticated``: a peer
    without a token may use it. ``audited``: it changes something, and leaves a line in the journal. ``delimited``:
    its reply follows an 0xFF.
    """
    marks = _Marks(name, while_frozen, unauthenticated, audited, delimited)

    def mark(method: F) -> F:
        setattr(method, _ATTRIBUTE, marks)
        return method

    return mark


class Table:
    """All commands of an agent, and who may use which when."""

    def __init__(
        self,
        *,
        is_frozen: Callable[[], bool],
        allow: Iterable[str] = (),
        block: Iterable[str] = (),
    ) -> None:
        self._commands: dict[str, Command] = {}
        self._is_frozen = is_frozen
        self._allow = frozenset(allow)
        self._block = frozenset(block)

    def add(self, topic: object) -> None:
        """Add every command of a topic."""
        for _, method in inspect.getmembers(topic, inspect.ismethod):
            marks = getattr(method, _ATTRIBUTE, None)
            if marks is not None:
                self._commands[marks.name] = Command(marks, method, *_signature(method))

    @property
    def unknown(self) -> list[str]:
        """Names in the allow and block lists that are no commands: a misspelt one would protect nobody."""
        return sorted((self._allow | self._block) - set(self._commands))

    @property
    def names(self) -> list[str]:
        """Sorted names of all commands, allowed or not."""
        return sorted(self._commands)

    def is_allowed(self, name: str) -> bool:
        """Whether configuration and the state allow ``name`` now: qemu-ga's rule, block wins over allow."""
        found = self._commands[name]
        frozen_out = self._is_frozen() and not found.marks.while_frozen
        return not frozen_out and (not self._allow or name in self._allow) and name not in self._block

    async def answer(self, value: Any, peer: Caller) -> Reply | Failure:
        """Run one decoded request to its end; never raises, except when it is cancelled."""
        started_s = time.monotonic()
        name, outcome, audited = "", "done", False
        try:
            if isinstance(value, AgentError):
                raise value
            request = Request.parse(value)
            name = request.execute
            found = self._admit(name, peer)
            audited = found.marks.audited
            arguments = read_parameters(found.parameters, request.arguments)
            result = await (found.method(peer, **arguments) if found.wants_peer else found.method(**arguments))
            return Reply(to_wire(result), request.echo, delimited=found.marks.delimited)
        except AgentError as error:
            outcome = error.desc
            return Failure(error, echo_of(value))
        except Exception:  # a bug: the peer gets a short answer, the journal the traceback
            log.exception("command %s failed", name)
            outcome = "internal error"
            return Failure(AgentError("internal error, see the guest's journal"), echo_of(value))
        finally:
            if audited:
                _audit(peer.origin, name, outcome, time.monotonic() - started_s)

    def _admit(self, name: str, peer: Caller) -> Command:
        found = self._commands.get(name)
        if found is None:
            raise CommandNotFound(f"The command {name} has not been found")
        # qemu-ga's text for what configuration refuses and for what is refused while frozen, to the letter.
        disabled = f"Command {name} has been disabled: the command is not allowed"
        if not peer.authenticated and not found.marks.unauthenticated:
            raise Unauthenticated(f"{name} needs ballast-authenticate first")
        if self._is_frozen() and not found.marks.while_frozen:
            raise Frozen(disabled)
        if not self.is_allowed(name):
            raise Refused(disabled)
        return found


def _audit(origin: str, name: str, outcome: str, elapsed_s: float) -> None:
    fields = {"PEER": origin, "COMMAND": name, "OUTCOME": outcome, "DURATION_US": round(1_000_000 * elapsed_s)}
    log.info("%s ran %s: %s, %.0f ms", origin, name, outcome, 1000 * elapsed_s, extra=fields)


def _signature(method: Callable[..., Awaitable[Any]]) -> tuple[dict[str, tuple[str, Any, bool]], bool]:
    hints = typing.get_type_hints(method)
    parameters = inspect.signature(method).parameters.values()
    arguments = {
        wire_name(p.name): (p.name, hints[p.name], p.default is inspect.Parameter.empty)
        for p in parameters
        if p.kind is inspect.Parameter.KEYWORD_ONLY
    }
    return arguments, any(p.name == "peer" for p in parameters)
