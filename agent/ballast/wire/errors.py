"""The error tree. A class says what the *caller* can do about it, and knows how it looks on the wire.

    AgentError                  GenericError
    ├── BadRequest              GenericError      bad-argument        mend the request
    ├── Unauthenticated         GenericError      unauthenticated     authenticate first
    ├── CommandNotFound         CommandNotFound   not-supported       another version may have it
    ├── Refused                 CommandNotFound   refused-by-policy   ask the guest's administrator
    ├── Frozen                  CommandNotFound   frozen              try again after the thaw
    ├── Busy                    GenericError      busy                try again later
    ├── NotSupported            GenericError      not-supported       this guest cannot do it
    ├── KernelFailure           GenericError      kernel              the kernel said no: operation, path, errno
    ├── DeadlineExceeded        GenericError      deadline            it took too long and was given up
    ├── NoSuchId                GenericError      no-such-id          the id is not known
    ├── StaleEpoch              GenericError      stale-epoch         another controller took over
    └── LeaseExpired            GenericError      lease-expired       the freeze ended by itself

"CommandNotFound" for what is absent or switched off is the QEMU guest agent's habit; libvirt relies on it:
any other class makes ``virsh guestinfo`` fail whole. Reasons are the closed list of docs/protocol.md.
"""

from __future__ import annotations

from typing import Any, ClassVar


class AgentError(Exception):
    """Root of all that a peer may be told. ``desc`` is for people, ``data`` for programs."""

    wire_class: ClassVar[str] = "GenericError"
    reason: ClassVar[str] = ""

    # Positional only: a peer's data may hold members named desc and self.
    def __init__(self, desc: str, /, **data: Any) -> None:
        super().__init__(desc)
        self.desc = desc
        self.data = data


class BadRequest(AgentError):
    """The request is malformed or an argument is wrong; the text names it."""

    reason = "bad-argument"


class Unauthenticated(AgentError):
    """This peer must authenticate before it may do this."""

    reason = "unauthenticated"


class CommandNotFound(AgentError):
    """No such command in this version."""

    wire_class = "CommandNotFound"
    reason = "not-supported"


class Refused(AgentError):
    """The guest's configuration does not allow it."""

    wire_class = "CommandNotFound"
    reason = "refused-by-policy"


class Frozen(AgentError):
    """Not while file systems are frozen."""

    wire_class = "CommandNotFound"
    reason = "frozen"


class Busy(AgentError):
    """Somebody else holds what is needed."""

    reason = "busy"


class NotSupported(AgentError):
    """This guest or its kernel cannot do it."""

    reason = "not-supported"


class KernelFailure(AgentError):
    """A system call failed.

    ``data`` holds operation, path and errno.
    """

    reason = "kernel"

    @classmethod
    def of(cls, operation: str, path: object, error: OSError) -> KernelFailure:
        """Tell of ``error`` in qemu-ga's manner: what was tried, on what, and the kernel's own word."""
        return cls(
            f"failed to {operation} {path}: {error.strerror or error}",
            operation=operation,
            path=str(path),
            errno=error.errno,
        )


class DeadlineExceeded(AgentError):
    """A peer, a hook or the kernel did not answer in time."""

    reason = "deadline"


class WriterRefused(AgentError):
    """A critical writer would not or could not freeze its application.

    ``data`` holds writers and filesystems, as in the reply to a freeze.
    """

    reason = "writer-failed"


class NoSuchId(AgentError):
    """The id is not that of anything held or remembered."""

    reason = "no-such-id"


class StaleEpoch(AgentError):
    """Another controller has claimed this guest since."""

    reason = "stale-epoch"


class LeaseExpired(AgentError):
    """The freeze was ended by its own lease before this request came."""

    reason = "lease-expired"


_BY_REASON: dict[str, type[AgentError]] = {
    kind.reason: kind
    for kind in (
        BadRequest,
        Unauthenticated,
        Refused,
        Frozen,
        Busy,
        NotSupported,
        KernelFailure,
        DeadlineExceeded,
        WriterRefused,
        NoSuchId,
        StaleEpoch,
        LeaseExpired,
    )
}


def from_wire(wire_class: str, desc: str, data: dict[str, Any]) -> AgentError:
    """The error that a reply tells of; a peer without reasons (qemu-ga) gives the class of its wire class."""
    rest = {key: value for key, value in data.items() if key != "reason"}
    if wire_class == CommandNotFound.wire_class and data.get("reason") in (None, CommandNotFound.reason):
        return CommandNotFound(desc, **rest)
    return _BY_REASON.get(str(data.get("reason")), AgentError)(desc, **rest)
