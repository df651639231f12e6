"""Tables of mounts and block devices as the kernel shows them, made of a few words."""

from __future__ import annotations

from ballast.guest.quiesce.forecast import Plan

MOUNTINFO = "proc/1/mountinfo"
ROOT = "8:1 ext4 /dev/sda1 /"


def table(*mounts: str) -> dict[str, str]:
    """Mounts as "device type source mountpoint [super options]", in a table as the kernel writes it."""
    lines, known = [], [(1, "")]
    for number, mount in enumerate(mounts, 20):
        device, kind, source, point, options = (*mount.split(), "rw")[:5]
        above = [(len(other), parent) for parent, other in known if f"{point}/".startswith(f"{other.rstrip('/')}/")]
        lines.append(f"{number} {max(above)[1]} {device} / {point} rw,relatime shared:1 - {kind} {source} {options}\n")
        known.append((number, point))
    return {MOUNTINFO: "".join(lines)}


def loop(device: str, file: str) -> dict[str, str]:
    """A loop device in sysfs."""
    return {f"sys/dev/block/{device}/loop/backing_file": f"{file}\n"}


def points(plan: Plan) -> list[list[str]]:
    """Mount points, level by level."""
    return [[filesystem.mountpoint for filesystem in level] for level in plan.levels]
