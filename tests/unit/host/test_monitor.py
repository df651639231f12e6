"""What QEMU says in its monitor: whatever is not exactly as known is refused; then real texts of it."""

from __future__ import annotations

import pytest

from ballast.host.monitor import (
    Object,
    RamBlock,
    parse_host_address,
    parse_net_clients,
    parse_objects,
    parse_ram_blocks,
)

BLOCKS = """\
              Block Name    PSize              Offset               Used              Total                HVA  RO
                     ram    4 KiB  0x0000000000000000 0x0000000140000000 0x0000000140000000 0x00007fed5ffff000  rw
    /rom@etc/acpi/tables    4 KiB  0x00000001500c0000 0x0000000000020000 0x0000000000200000 0x00007feee5a00000  ro
"""
OLD_BLOCKS = """\
              Block Name    PSize              Offset               Used              Total                HVA
                  pc.ram    2 MiB  0x0000000000000000 0x0000000040000000 0x0000000040000000 0x00007f1a2be00000
"""
TREE = """\
/machine (pc-q35-10.0-machine)
  /fw_cfg (fw_cfg_io)
    /\\x2from@etc\\x2facpi\\x2frsdp[0] (memory-region)
  /peripheral (container)
    /vsock (vhost-user-vsock-pci)
      /bus master[0] (memory-region)
      /virtio-backend (vhost-user-vsock-device)
  /peripheral-anon (container)
    /device[0] (virtio-balloon-pci)
"""
NETWORK = """\
hub 0
 \\ hub0port1: n1: index=0,type=user,net=10.0.2.0,restrict=off
nic: index=0,type=nic,model=virtio-net-pci,macaddr=52:54:00:12:34:56
 \\ n0: index=0,type=vhost-user,chardev=c0
n2: index=0,type=tap,ifname=tap0,script=no,downscript=no
filters:
  - f0: type=filter-dump,file=/dev/null,maxlen=65536,netdev=n2,queue=all
 \\ #net007: index=0,type=user,net=10.0.2.0,restrict=off
"""


@pytest.mark.parametrize(
    "text",
    ["", "unknown command", BLOCKS.replace("HVA", "", 1), BLOCKS.replace(" 0x00007fed5ffff000", ""), BLOCKS + "x\n"],
)
def test_blocks_that_are_not_understood_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"no table|no block"):
        parse_ram_blocks(text)


def test_blocks_have_their_size_in_use_and_their_address() -> None:
    acpi = RamBlock("/rom@etc/acpi/tables", 0x20000, 0x7FEEE5A00000)
    assert parse_ram_blocks(BLOCKS) == [RamBlock("ram", 5 << 30, 0x7FED5FFFF000), acpi]
    unused = BLOCKS.replace("ram  ", "     ", 1)
    assert parse_ram_blocks(unused)[0] == RamBlock("", 5 << 30, 0x7FED5FFFF000)
    assert parse_ram_blocks(OLD_BLOCKS) == [RamBlock("pc.ram", 1 << 30, 0x7F1A2BE00000)]
    unplugged = RamBlock("", 5 << 30, 0x7FED5FFFF000)
    assert parse_ram_blocks(BLOCKS.replace(" ram ", "     ")) == [unplugged, acpi]


@pytest.mark.parametrize("text", ["", "unknown command: 'gpa2hva'", "Host virtual address for 0x1000 is 0x2000"])
def test_an_address_that_is_not_understood_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="no address"):
        parse_host_address(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Host virtual address for 0x100000000 (a (b) c) is 0x7feddffff000\n", 0x7FEDDFFFF000),
        ("No memory is mapped at address 0x80000000\n", None),
        ("Memory at address 0xfee00000 is not RAM", None),
    ],
)
def test_an_address_has_memory_or_none(text: str, expected: int | None) -> None:
    assert parse_host_address(text) == expected


@pytest.mark.parametrize("text", ["machine (x)", "/machine", "/a (b)\n    /c (d)"])
def test_a_tree_that_is_not_understood_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"no object|no parent"):
        parse_objects(text)


def test_objects_have_paths() -> None:
    objects = parse_objects(TREE)
    assert objects[0] == Object("/machine", "pc-q35-10.0-machine")
    assert Object("/machine/peripheral/vsock/virtio-backend", "vhost-user-vsock-device") in objects
    assert objects[-1] == Object("/machine/peripheral-anon/device[0]", "virtio-balloon-pci")


@pytest.mark.parametrize("text", ["n0", "n0: type=user", "n0: index=0,model=x"])
def test_a_network_that_is_not_understood_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="no network client"):
        parse_net_clients(text)


def test_network_clients_have_types() -> None:
    assert parse_net_clients("") == []
    types = dict(parse_net_clients(NETWORK))
    assert types == {"n1": "user", "nic": "nic", "n0": "vhost-user", "n2": "tap", "#net007": "user"}
