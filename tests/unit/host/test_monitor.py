"""What QEMU says in its monitor: whatever is not exactly as known is refused; then real texts of it."""

from __future__ import annotations

import pytest

from ballast.host.monitor import (
    FlatRange,
    Object,
    RamBlock,
    parse_flat_view,
    parse_host_address,
    parse_net_clients,
    parse_objects,
    parse_ram_blocks,
)

VIEW = """\
FlatView #0
 AS "cpu-smm-0", root: memory
 Root memory region: memory
  0000000000000000-00000000000bffff (prio 0, ram): elsewhere

FlatView #3
 AS "mch", root: bus master container
 Root memory region: (none)
  No rendered FlatView

FlatView #5
 AS "memory", root: system
 AS "cpu-memory-0", root: system
 Root memory region: system
{}
"""
LINES = """\
  0000000000000000-00000000000bffff (prio 0, ram): ram KVM
  00000000000c0000-00000000000dffff (prio 1, rom): pc.rom
  0000000000100000-000000007fffffff (prio 0, ram): ram @0000000000100000 KVM
  00000000fee00000-00000000feefffff (prio 4096, i/o): apic-msi
  00000000ffc00000-00000000ffffffff (prio 0, romd): system.flash0 KVM
  0000000100000000-00000001bfffffff (prio 0, ram): ram @0000000080000000 KVM
  00000001c0000000-00000001cfffffff (prio 0, ram): memory of dimm 1
  0000000200000000-000000020fffffff (prio 0, nv-ram): pmem0
  000000c000000000-000000c00fffffff (prio 1, ramd): 0000:01:00.0 BAR 0 mmaps[0]"""
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
    ("text", "problem"),
    [
        ("", "0 views"),
        ('FlatView #0\n AS "I/O", root: io\n Root memory region: io\n', "0 views"),
        (VIEW.format(LINES) * 2, "2 views"),
        (VIEW.format("  0000-0fff (prio 0, ram): ram"), "no range"),
        (VIEW.format(LINES.replace("prio 0, ram", "prio 0, RAM", 1)), "no range"),
        (VIEW.format(LINES.replace("(prio 0, ram)", "(ram)", 1)), "no range"),
        (VIEW.format("  No rendered FlatView"), "no range"),
    ],
)
def test_a_view_that_is_not_understood_is_refused(text: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        parse_flat_view(text)


def test_a_view_tells_ram_alone() -> None:
    expected = [
        FlatRange(0, 0xC0000, "ram", 0),
        FlatRange(0x100000, 0x7FF00000, "ram", 0x100000),
        FlatRange(0x100000000, 0xC0000000, "ram", 0x80000000),
        FlatRange(0x1C0000000, 0x10000000, "memory of dimm 1", 0),
    ]
    assert parse_flat_view(VIEW.format(LINES)) == expected
    assert parse_flat_view(VIEW.format(LINES).replace("\n", "\r\n")) == expected


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


@pytest.mark.parametrize(
    "text", ["", "No memory is mapped at address 0x80000000", "Memory at address 0xfee00000 is not RAM"]
)
def test_an_address_without_memory_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="no address"):
        parse_host_address(text)


def test_an_address_is_of_a_region() -> None:
    said = "Host virtual address for 0x100000000 (a (b) c) is 0x7feddffff000\n"
    assert parse_host_address(said) == ("a (b) c", 0x7FEDDFFFF000)


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
