"""The kernel's own balloons: which driver has a device, what it holds, what it has taken and given back since boot.

drivers/virtio/virtio_balloon.c, drivers/hv/hv_balloon.c, drivers/misc/vmw_balloon.c, mm/balloon_compaction.c, read for
Linux 6.1 and 6.12. The first and the last count their pages in /proc/vmstat, hv_balloon in debugfs only; later kernels
have the line ``Balloon`` in /proc/meminfo for all three.
"""

from __future__ import annotations

from dataclasses import dataclass

from ballast.guest.linux.tree import Tree

HV_BALLOON = "hv_balloon"
_VMW_BALLOON = "vmw_balloon"
_HV_DEBUG_FILE = "sys/kernel/debug/hv-balloon"
# A driver's folder has a link for each of its devices, beside files that every driver has.
_DRIVERS = (
    ("virtio_balloon", "sys/bus/virtio/drivers/virtio_balloon", "virtio"),
    (HV_BALLOON, "sys/bus/vmbus/drivers/hv_balloon", ""),
)
_FILES = frozenset({"bind", "unbind", "uevent", "module", "new_id", "remove_id"})


@dataclass(frozen=True, slots=True)
class Counters:
    """Base pages that the kernel's balloons took, gave back and had moved since boot."""

    inflated_pages: int
    deflated_pages: int
    migrated_pages: int


def find_driver(tree: Tree) -> str | None:
    """The driver that has a balloon; None if there is none. vmw_balloon stays loaded on VMware's machines only."""
    for driver, folder, prefix in _DRIVERS:
        if any(name.startswith(prefix) and name not in _FILES for name in tree.names(folder)):
            return driver
    return _VMW_BALLOON if tree.exists(f"sys/module/{_VMW_BALLOON}") else None


def parse_counters(text: str) -> Counters | None:
    """Parse /proc/vmstat, lines such as ``balloon_inflate 131072``; None without them (CONFIG_MEMORY_BALLOON)."""
    counts = [_number(text, f"balloon_{what} ") for what in ("inflate", "deflate", "migrate")]
    inflated, deflated, migrated = counts
    if inflated is None or deflated is None:
        return None
    return Counters(inflated, deflated, migrated or 0)


def parse_balloon_kib(text: str) -> int | None:
    """Parse /proc/meminfo for the line ``Balloon:           524288 kB``; None on kernels without it."""
    value = _line(text, "Balloon:")
    return int(value.removesuffix("kB")) if value is not None else None


def read_hv_ballooned_bytes(tree: Tree) -> int | None:
    """What hv_balloon holds, by debugfs; None where that is not mounted, not ours to read, or of an older kernel."""
    try:
        return parse_hv_balloon(tree.read(_HV_DEBUG_FILE))
    except OSError:
        return None


def parse_hv_balloon(text: str) -> int | None:
    """Bytes, by the lines ``page_size : 4096`` and ``pages_ballooned : 262144``; None without one of them."""
    fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in text.splitlines())}
    page_bytes, pages = fields.get("page_size", ""), fields.get("pages_ballooned", "")
    return int(page_bytes) * int(pages) if page_bytes.isdecimal() and pages.isdecimal() else None


def _number(text: str, name: str) -> int | None:
    value = _line(text, name)
    return int(value) if value is not None else None


def _line(text: str, name: str) -> str | None:
    """The rest of the line that begins with ``name``."""
    _, found, rest = f"\n{text}\n".partition(f"\n{name}")
    return rest.partition("\n")[0].strip() if found else None
