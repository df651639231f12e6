"""What a virtual machine is to us: where its memory is on this host, and which ranges of it may be given back.

Pure: ``qemu`` provides it, ``reclaim`` uses it. Addresses without another word are guest-physical.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ballast.wire.errors import AgentError
from ballast.wire.memory_names import Ranges

PAGE_BYTES = 4096
# Below are firmware, video memory and their aliases: chipsets switch there between RAM and ROM (PAM, SMRAM).
LOWEST_ADDRESS = 1 << 20

Held = Sequence[Sequence[int]]  # as Ranges


class NotReclaimable(AgentError):
    """Memory of this machine is not to be changed from here; the text names what stands in the way."""


class WrongRanges(NotReclaimable):
    """The guest named memory that is not its to give back; nothing of the whole answer is touched."""


class QmpFailed(AgentError):
    """QEMU refused a command, or answered it in a form that we do not know."""


@dataclass(frozen=True, slots=True)
class Region:
    """RAM of the guest's that is one piece of one file on the host."""

    address: int
    bytes: int
    fd: int
    offset: int
    name: str


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a file that backs memory."""

    fd: int
    offset: int
    bytes: int


@dataclass(frozen=True, slots=True)
class MemoryMap:
    """All RAM that is a shared file, by rising address."""

    regions: Sequence[Region]

    def locate(self, ranges: Ranges, held: Held = ()) -> list[Piece]:
        """Where these ranges are on the host; ``held`` is what was given back before. WrongRanges, for all or none."""
        return [piece for address, bytes_ in checked(ranges, held) for piece in self._pieces(address, bytes_)]

    def _pieces(self, address: int, bytes_: int) -> Iterator[Piece]:
        end = address + bytes_
        for region in self.regions:
            first, last = max(address, region.address), min(end, region.address + region.bytes)
            if first < last and first == address:
                yield Piece(region.fd, region.offset + first - region.address, last - first)
                address = last
        if address < end:
            raise WrongRanges(f"the guest named {_text(address, end - address)}, where it has no RAM")


def checked(ranges: Ranges, held: Held = ()) -> Ranges:
    """The same ranges, if they are whole pages in RAM's place, rising, and apart, also from ``held``; WrongRanges."""
    least = LOWEST_ADDRESS
    for one in ranges:
        if len(one) != 2 or any(type(number) is not int for number in one):
            raise WrongRanges(f"the guest named {one!r}, which is no range")
        address, bytes_ = one
        if address % PAGE_BYTES or bytes_ % PAGE_BYTES or bytes_ <= 0:
            raise WrongRanges(f"the guest named {_text(address, bytes_)}, which is no number of whole pages")
        if address < LOWEST_ADDRESS:
            raise WrongRanges(f"the guest named {_text(address, bytes_)}, in the first MiB")
        if address < least:
            raise WrongRanges(f"the guest named {_text(address, bytes_)} twice, or after a higher range")
        least = address + bytes_
    _check_apart(ranges, held)
    return ranges


def _check_apart(ranges: Ranges, held: Held) -> None:
    """Neither overlaps itself, so sorted in one row only neighbours can overlap."""
    least = 0
    for address, bytes_ in sorted([list(one) for one in (*ranges, *held)]):
        if address < least:
            raise WrongRanges(f"the guest named {_text(address, bytes_)}, of which it gave back a part before")
        least = address + bytes_


def _text(address: int, bytes_: int) -> str:
    return f"{address:#x}+{bytes_:#x}"
