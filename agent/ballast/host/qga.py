"""What the QEMU guest agent's own commands return (qga/qapi-schema.json, QEMU 10.0), as far as we call them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CommandInfo:
    """GuestAgentCommandInfo. ``enabled`` follows configuration and whether file systems are frozen."""

    name: str
    enabled: bool
    success_response: bool = True


@dataclass(frozen=True, slots=True)
class GuestInfo:
    """GuestAgentInfo."""

    version: str
    supported_commands: list[CommandInfo]


@dataclass(frozen=True, slots=True)
class MemoryBlock:
    """GuestMemoryBlock; ``can_offline`` is left out when setting."""

    phys_index: int
    online: bool
    can_offline: bool | None = None


@dataclass(frozen=True, slots=True)
class MemoryBlockResult:
    """GuestMemoryBlockResponse: success, not-found, operation-not-supported or operation-failed; then the errno."""

    phys_index: int
    response: str
    error_code: int | None = None


@dataclass(frozen=True, slots=True)
class MemoryBlockInfo:
    """GuestMemoryBlockInfo, in bytes."""

    size: int
