"""Who brings hot-added memory online besides us: the kernel itself, virtio-mem's driver and udev's rules.

Documentation/admin-guide/mm/memory-hotplug.rst, drivers/base/memory.c and mm/memory_hotplug.c (Linux 6.1, 6.12), and
udev(7).
"""

from __future__ import annotations

import re

AUTO_ONLINE = "sys/devices/system/memory/auto_online_blocks"  # offline, online, online_kernel or online_movable
# Which zone a plain "online" means: contig-zones, or since Linux 5.15 auto-movable, within a share in percent.
POLICY = "sys/module/memory_hotplug/parameters/online_policy"
MOVABLE_PERCENT = "sys/module/memory_hotplug/parameters/auto_movable_ratio"

RULES = ("etc/udev/rules.d", "run/udev/rules.d", "usr/local/lib/udev/rules.d", "usr/lib/udev/rules.d")
VENDOR = "sys/class/dmi/id/sys_vendor"

_VIRTIO_MEM = re.compile(r"^ *([0-9a-f]+)-([0-9a-f]+) : System RAM \(virtio_mem\)$", re.MULTILINE)
_WRITES_STATE = re.compile(r'^[^#\n]*\bATTR\{state\}="[^"]+"', re.MULTILINE)
_OF_MEMORY = re.compile(r'^[^#\n]*\bSUBSYSTEM[!=]="memory"', re.MULTILINE)
_OF_VENDOR = re.compile(r'^[^#\n]*\bATTR\{\[dmi/id\]sys_vendor\}=="([^"]*)"', re.MULTILINE)


def parse_virtio_mem_ranges(text: str) -> list[tuple[int, int]]:
    """Memory of virtio-mem devices in /proc/iomem, as [(first byte, bytes)].

    ``  140000000-147ffffff : System RAM (virtio_mem)``, below its device. Without CAP_SYS_ADMIN there is none.
    """
    ranges = [(int(first, 16), int(last, 16) + 1 - int(first, 16)) for first, last in _VIRTIO_MEM.findall(text)]
    return [(first, size_bytes) for first, size_bytes in ranges if size_bytes > 1]


def parse_onlining_rule(text: str, vendor: str) -> bool:
    """Whether a udev rules file may bring memory online in a machine of that vendor (DMI's ``sys_vendor``).

    ``SUBSYSTEM=="memory", ACTION=="add", ATTR{state}!="online", ATTR{state}="online"``. Of what else a rule asks only
    the machine's vendor is looked at: Debian's and Ubuntu's 40-vm-hotadd.rules are for Hyper-V and Xen.
    """
    vendors = _OF_VENDOR.findall(text)
    return bool(_WRITES_STATE.search(text) and _OF_MEMORY.search(text)) and (not vendors or vendor in vendors)
