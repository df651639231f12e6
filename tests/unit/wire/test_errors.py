"""The error tree on the wire: QEMU's classes, our closed list of reasons."""

from __future__ import annotations

import errno
import json

import pytest

from ballast.wire import errors
from ballast.wire.errors import AgentError, KernelFailure, from_wire
from ballast.wire.message import Failure, parse_answer

KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, AgentError)]
REASONS = {
    "bad-argument",
    "unauthenticated",
    "refused-by-policy",
    "busy",
    "not-supported",
    "frozen",
    "kernel",
    "deadline",
    "no-such-id",
    "stale-epoch",
    "lease-expired",
    "writer-failed",
}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_error_comes_back_as_its_own_class(kind: type[AgentError]) -> None:
    failure = parse_answer(json.loads(Failure(kind("why", path="/x")).encode()))
    assert isinstance(failure, Failure)
    assert type(failure.error) is kind
    assert (failure.error.desc, failure.error.data) == ("why", {"path": "/x"})


def test_the_reasons_are_those_of_the_protocol() -> None:
    assert {kind.reason for kind in KINDS} == REASONS | {""}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_what_is_absent_or_switched_off_is_command_not_found(kind: type[AgentError]) -> None:
    absent = {"CommandNotFound", "Refused", "Frozen"}
    assert kind.wire_class == ("CommandNotFound" if kind.__name__ in absent else "GenericError")


def test_a_kernel_failure_says_what_where_and_why() -> None:
    error = KernelFailure.of("freeze", "/data", OSError(errno.EBUSY, "Device or resource busy"))
    assert error.desc == "failed to freeze /data: Device or resource busy"
    assert error.data == {"operation": "freeze", "path": "/data", "errno": errno.EBUSY}


def test_data_may_hold_any_member() -> None:
    assert from_wire("GenericError", "no", {"desc": "x", "self": 1, "wire_class": 2}).desc == "no"
