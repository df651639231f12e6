"""What QEMU's monitor says of memory and devices, as text: parsers of HMP, which QMP has no commands for.

Texts as QEMU 7.2 and 10.0 print them (system/memory.c, system/physmem.c, qom/qom-hmp-cmds.c, net/net.c). People are
meant to read them, so whatever is not exactly as known is a ValueError: nothing is guessed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_BLOCK = re.compile(
    r" *(?:(?P<name>\S.*?) +)?(?P<page>\d+ [KMGT]iB) +0x[0-9a-f]+ +0x(?P<used>[0-9a-f]+) +0x(?P<total>[0-9a-f]+)"
    r" +0x(?P<address>[0-9a-f]+)(?: +(?:ro|rw))?"
)
_ADDRESS = re.compile(r"Host virtual address for 0x[0-9a-f]+ \(.+\) is 0x(?P<address>[0-9a-f]+)")
_NO_ADDRESS = re.compile(r"No memory is mapped at address 0x[0-9a-f]+|Memory at address 0x[0-9a-f]+ is not RAM")
_OBJECT = re.compile(r"(?P<indent> *)/(?P<name>.*) \((?P<type>[^()]*)\)")
_NET_CLIENT = re.compile(r"(?: \\ (?:\S+: )?)?(?P<name>\S+): index=\d+,type=(?P<type>[a-z0-9-]+),?.*")
_NET_OTHER = re.compile(r"hub \d+|filters:|  - \S+: type=.*| \\ \S+")


@dataclass(frozen=True, slots=True)
class RamBlock:
    """A piece of QEMU's memory; ``address`` is QEMU's own."""

    name: str
    bytes: int
    address: int


@dataclass(frozen=True, slots=True)
class Object:
    """An object of QEMU's, by its path from the root of the listing."""

    path: str
    type: str


def parse_ram_blocks(text: str) -> list[RamBlock]:
    """All blocks of ``info ramblock``. Without a name are those that no device uses yet, or any more.

    ``    ram    4 KiB  0x0000000000000000 0x0000000140000000 0x0000000140000000 0x00007fed5ffff000  rw``
    """
    lines = text.splitlines()
    if not lines or lines[0].split()[:3] != ["Block", "Name", "PSize"] or "HVA" not in lines[0]:
        raise ValueError("no table of blocks with their addresses")
    blocks = []
    for line in filter(None, lines[1:]):
        if not (match := _BLOCK.fullmatch(line)):
            raise ValueError(f"no block: {line!r}")
        blocks.append(RamBlock(match["name"] or "", int(match["used"], 16), int(match["address"], 16)))
    return blocks


def parse_host_address(text: str) -> int | None:
    """QEMU's own address, of ``gpa2hva``; None where the guest has no RAM.

    ``Host virtual address for 0x100000000 (ram) is 0x7feddffff000``
    """
    line = text.strip()
    if match := _ADDRESS.fullmatch(line):
        return int(match["address"], 16)
    if _NO_ADDRESS.fullmatch(line):
        return None
    raise ValueError(f"no address: {line!r}")


def parse_objects(text: str) -> list[Object]:
    """All objects of ``info qom-tree PATH``, parents first.

    ``    /vsock (vhost-user-vsock-pci)``
    """
    objects: list[Object] = []
    parents: list[str] = []
    for line in filter(None, text.splitlines()):
        if not (match := _OBJECT.fullmatch(line)):
            raise ValueError(f"no object: {line!r}")
        depth = len(match["indent"]) // 2
        if depth > len(parents):
            raise ValueError(f"no parent: {line!r}")
        parents[depth:] = [match["name"]]
        objects.append(Object("/" + "/".join(parents), match["type"]))
    return objects


def parse_net_clients(text: str) -> list[tuple[str, str]]:
    """Names and types of ``info network``, both the guest's devices (nic) and the host's ends (user, tap, vhost-user).

    `` \\ n0: index=0,type=user,net=10.0.2.0,restrict=off``
    """
    found = []
    for line in filter(None, text.splitlines()):
        if _NET_OTHER.fullmatch(line):
            continue
        if not (match := _NET_CLIENT.fullmatch(line)):
            raise ValueError(f"no network client: {line!r}")
        found.append((match["name"], match["type"]))
    return found
