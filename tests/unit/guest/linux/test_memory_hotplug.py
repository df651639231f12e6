"""Who else brings memory online, by what the kernel and udev's rules say."""

from __future__ import annotations

import pytest

from ballast.guest.linux.memory_hotplug import parse_onlining_rule, parse_virtio_mem_ranges

# Debian's and Ubuntu's 40-vm-hotadd.rules, without the processors.
DEBIAN = """\
ATTR{[dmi/id]sys_vendor}=="Microsoft Corporation", ATTR{[dmi/id]product_name}=="Virtual Machine", GOTO="vm_hotadd_apply"
ATTR{[dmi/id]sys_vendor}=="Xen", GOTO="vm_hotadd_apply"
GOTO="vm_hotadd_end"
LABEL="vm_hotadd_apply"
# Memory hotadd request
SUBSYSTEM=="memory", ACTION=="add", TEST=="state", ATTR{state}!="online", ATTR{state}="online"
LABEL="vm_hotadd_end"
"""
RED_HAT = """\
SUBSYSTEM!="memory", GOTO="memory_hotplug_end"
ACTION!="add", GOTO="memory_hotplug_end"
ENV{.state}="online"
ATTR{state}=="offline", ATTR{state}="$env{.state}"
"""
SUSE = 'SUBSYSTEM=="memory", ACTION=="add", ATTR{state}=="offline", ATTR{state}="online"'


@pytest.mark.parametrize(
    ("text", "vendor", "onlines"),
    [
        ("", "QEMU", False),
        ("# " + SUSE, "QEMU", False),
        ('SUBSYSTEM=="memory", ATTR{state}=="online", TAG+="systemd"', "QEMU", False),
        ('SUBSYSTEM=="cpu", ATTR{state}="online"', "QEMU", False),
        (SUSE, "QEMU", True),
        (RED_HAT, "QEMU", True),
        (DEBIAN, "QEMU", False),
        (DEBIAN, "", False),
        (DEBIAN, "Xen", True),
        (DEBIAN, "Microsoft Corporation", True),
    ],
)
def test_rules(text: str, vendor: str, *, onlines: bool) -> None:
    assert parse_onlining_rule(text, vendor) is onlines


@pytest.mark.parametrize(
    ("text", "ranges"),
    [
        ("", []),
        ("100000000-13fffffff : System RAM", []),
        ("00000000-00000000 : virtio0\n  00000000-00000000 : System RAM (virtio_mem)", []),
        (
            "140000000-23fffffff : virtio0\n  140000000-147ffffff : System RAM (virtio_mem)\n    140000000-1 : x",
            [(0x140000000, 0x8000000)],
        ),
    ],
)
def test_virtio_mem(text: str, ranges: list[tuple[int, int]]) -> None:
    assert parse_virtio_mem_ranges(text) == ranges
