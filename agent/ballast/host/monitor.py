"""What QEMU's monitor says of memory and devices, as text: parsers of HMP, which QMP has no commands for.

Texts as QEMU 7.2 and 10.0 print them (system/memory.c, system/physmem.c, qom/qom-hmp-cmds.c, net/net.c). People are
meant to read them, so whatever is not exactly as known is a ValueError: nothing is guessed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_VIEW = re.compile(r"^FlatView #\d+\n(?P<body>(?: .*\n)*)", re.MULTILINE)
_SPACE = re.compile(r'^ AS "memory", root: system$', re.MULTILINE)
_RANGE = re.compile(
    r"  (?P<first>[0-9a-f]{16})-(?P<last>[0-9a-f]{16}) \(prio -?\d+, (?P<kind>[a-z/-]+)\): (?P<name>.+?)"
    r"(?: @(?P<offset>[0-9a-f]{16}))?(?: KVM)?"
)
_BLOCK = re.compile(
    r" *(?:(?P<name>\S.*?) +)?(?P<page>\d+ [KMGT]iB) +0x[0-9a-f]+ +0x(?P<used>[0-9a-f]+) +0x(?P<total>[0-9a-f]+)"
    r" +0x(?P<address>[0-9a-f]+)(?: +(?:ro|rw))?"
)
_ADDRESS = re.compile(r"Host virtual address for 0x[0-9a-f]+ \((?P<name>.+)\) is 0x(?P<address>[0-9a-f]+)")
_OBJECT = re.compile(r"(?P<indent> *)/(?P<name>.*) \((?P<type>[^()]*)\)")
_NET_CLIENT = re.compile(r"(?: \\ (?:\S+: )?)?(?P<name>\S+): index=\d+,type=(?P<type>[a-z0-9-]+),?.*")
_NET_OTHER = re.compile(r"hub \d+|filters:|  - \S+: type=.*| \\ \S+")


@dataclass(frozen=True, slots=True)
class FlatRange:
    """RAM as the guest sees it: guest-physical address, and which part of which memory region it is."""

    address: int
    bytes: int
    region: str
    offset: int


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


def parse_flat_view(text: str) -> list[FlatRange]:
    """RAM of the address space "memory" in ``info mtree -f``, by rising address.

    ``  0000000100000000-00000001bfffffff (prio 0, ram): ram @0000000080000000``
    """
    bodies = [match["body"] for match in _VIEW.finditer(text.replace("\r\n", "\n")) if _SPACE.search(match["body"])]
    if len(bodies) != 1:
        raise ValueError(f'{len(bodies)} views of the address space "memory"')
    found = []
    for line in bodies[0].splitlines():
        if line.startswith((" AS ", " Root memory region: ")):
            continue
        if not (match := _RANGE.fullmatch(line)):
            raise ValueError(f"no range: {line!r}")
        if match["kind"] == "ram":
            first, last = int(match["first"], 16), int(match["last"], 16)
            found.append(FlatRange(first, last + 1 - first, match["name"], int(match["offset"] or "0", 16)))
    return found


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


def parse_host_address(text: str) -> tuple[str, int]:
    """Memory region, and QEMU's own address, of ``gpa2hva``.

    ``Host virtual address for 0x100000000 (ram) is 0x7feddffff000``
    """
    if not (match := _ADDRESS.fullmatch(text.strip())):
        raise ValueError(f"no address: {text.strip()!r}")
    return match["name"], int(match["address"], 16)


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
