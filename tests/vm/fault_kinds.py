"""The kinds of faults of the campaign: what goes wrong while all is frozen, and what the end must say.

A kind has one variant or more; each round takes one of them. Harms are the witness's words (witness.py).
"""

from __future__ import annotations

from dataclasses import dataclass

MOUNTPOINTS = ("/", "/mnt/data1", "/mnt/data2", "/mnt/data0")
DATA = MOUNTPOINTS[1:]
LOOP = "/mnt/lab-loop"
LOOP_FILE = "/mnt/data1/lab-loop.img"
TIMER = "lab-stamp.timer"
STEPS_S = (-7200, -90, 90, 7200)

_LONG_MS, _SHORT_MS, _BLOCKED_MS, _UPGRADE_MS, _REBOOT_MS = 30_000, 2_000, 4_000, 60_000, 10_000
_AT_ONCE_S = 1.0
_BY_LEASE_S = _SHORT_MS / 1000 + 1
_BY_HOST_S = 5.0  # the host has to hear of the harm first
_GUARD_STOPPED_S = 7.0

_MOUNT_LOOP = f"mkdir -p {LOOP}; mount -o loop {LOOP_FILE} {LOOP}"
_UMOUNT_LOOP = f"until umount {LOOP}; do sleep 0.1; done 2>/dev/null; rmdir {LOOP}"
_MOUNT_AGAIN = "mountpoint -q {0} || mount {0}"
_PLUG_AGAIN = """
umount -l /mnt/data0 2>/dev/null || true
echo 1 >/sys/bus/pci/rescan
until [ -e /dev/disk/by-id/virtio-data0 ]; do sleep 0.1; done
mountpoint -q /mnt/data0 || mount /mnt/data0
"""
_UPGRADED = """
while pgrep -x dpkg >/dev/null; do sleep 0.2; done
dpkg-query --show --showformat '${db:Status-Status}' ballast-agent | grep -qx installed ||
    { cat /run/lab-dpkg.log; false; }
"""


@dataclass(frozen=True, slots=True)
class Variant:
    """A harm, the lease, the bound from the harm to the last thaw, and the reasons that the end may give.

    ``before`` and ``after`` are scripts in the guest; ``afterwards`` is done by the witness when all writes again.
    ``is_ended``: the host ends it after the harm. ``trouble``: what a test writer does, and at which verb.
    """

    harms: tuple[str, ...]
    lease_ms: int
    bound_s: float
    reasons: tuple[str | None, ...]
    afterwards: tuple[str, ...] = ()
    before: str = ""
    after: str = ""
    mountpoints: tuple[str, ...] = MOUNTPOINTS
    exclude: tuple[str, ...] = ()
    trouble: str = ""
    is_ended: bool = False
    is_parked: bool = False
    is_degraded: bool = False
    is_refused: bool = False
    has_balloon: bool = False
    cuts: str = ""


def _agent(*harms: str, **more: object) -> Variant:
    return Variant(harms, _LONG_MS, _AT_ONCE_S, ("agent-restarted",), **more)  # type: ignore[arg-type]


def _guard(*harms: str, **more: object) -> Variant:
    return Variant(harms, _LONG_MS, _AT_ONCE_S, ("guard-lost",), **more)  # type: ignore[arg-type]


def _lease(*harms: str, **more: object) -> Variant:
    return Variant(harms, _SHORT_MS, _BY_LEASE_S, ("lease-expired",), **more)  # type: ignore[arg-type]


def _ended(*harms: str, reason: str | None = None, **more: object) -> Variant:
    return Variant(harms, _LONG_MS, _BY_HOST_S, (reason,), is_ended=True, **more)  # type: ignore[arg-type]


def _troubled(what: str) -> tuple[Variant, ...]:
    """Before the freeze the writer is left out; at the thaw what it held is lost, unless it answers all the same."""
    lost = None if what == "fork" else "writer-lost"
    return tuple(
        _ended(trouble=f"{name} {verb} {what}", reason=lost if verb == "thaw" else None)
        for name in ("lab-shop", "lab-base")
        for verb in ("prepare", "freeze", "thaw")
    )


def _parked(harm: str | None, reasons: tuple[str, ...]) -> Variant:
    """A write that stands still in the kernel keeps its file system from freezing; the others wait for it."""
    bound_s = _AT_ONCE_S if harm else _BY_LEASE_S
    return Variant((harm,) if harm else (), _SHORT_MS, bound_s, reasons, is_parked=True)


KINDS: dict[str, tuple[Variant, ...]] = {
    "agent-killed": (_agent("kill agent"), _agent("kill agent", mountpoints=DATA)),
    "agent-stopped": (
        _lease("stop agent", afterwards=("resume agent",)),
        Variant(("stop agent",), _SHORT_MS, _BY_LEASE_S, ("agent-restarted",), afterwards=("kill agent",)),
    ),
    "agent-oom": (_agent("oom agent"),),
    "guard-killed": (_guard("kill guard"),),
    "guard-stopped": (
        Variant(("stop guard",), _SHORT_MS, _SHORT_MS / 1000 + _GUARD_STOPPED_S, ("lease-expired", "guard-lost")),
    ),
    "guard-oom": (_guard("oom guard"),),
    "holder-killed": (_ended("kill balloon", has_balloon=True),),
    "holder-stopped": (_ended("stop balloon", has_balloon=True, afterwards=("resume balloon",)),),
    "holder-oom": (_ended("oom balloon", has_balloon=True),),
    "channel-cut": (_lease(cuts="vsock"), _lease(cuts="serial")),
    "host-gone": (_lease(), _ended()),
    "write-parked": (
        _parked(None, ("lease-expired",)),
        _parked("kill guard", ("guard-lost", "lease-expired")),
        _parked("kill agent", ("agent-restarted",)),
    ),
    "writer-hangs": _troubled("hang"),
    "writer-keeps-stdout": (*_troubled("fork"), *_troubled("fork-exit")),
    "writer-exits": _troubled("exit"),
    "writer-dies-frozen": (
        _ended("kill writer-lab-shop", reason="writer-lost"),
        _ended("kill writer-lab-base", reason="writer-lost"),
        _agent("kill writer-lab-base", "kill agent"),
    ),
    "unmounted": (
        _ended("umount /mnt/data1", after=_MOUNT_AGAIN.format("/mnt/data1")),
        _guard("umount /mnt/data1", "kill guard", after=_MOUNT_AGAIN.format("/mnt/data1")),
        _agent("umount /mnt/data1", "kill agent", after=_MOUNT_AGAIN.format("/mnt/data1")),
    ),
    "unplugged": (_ended("unplug /mnt/data0", after=_PLUG_AGAIN), _lease("unplug /mnt/data0", after=_PLUG_AGAIN)),
    "loop-on-frozen": (
        _agent("kill agent", before=_MOUNT_LOOP, after=_UMOUNT_LOOP, mountpoints=(*MOUNTPOINTS, LOOP)),
        _guard("kill guard", before=_MOUNT_LOOP, after=_UMOUNT_LOOP, mountpoints=(*MOUNTPOINTS, LOOP)),
        _ended(before=_MOUNT_LOOP, after=_UMOUNT_LOOP, mountpoints=(*MOUNTPOINTS, LOOP)),
        _ended("dirty " + LOOP, before=_MOUNT_LOOP, after=_UMOUNT_LOOP, exclude=(LOOP,)),
    ),
    "stranger-first": (
        _lease(
            before="fsfreeze -f /mnt/data1",
            after="fsfreeze -u /mnt/data1",
            mountpoints=("/", "/mnt/data2", "/mnt/data0"),
            is_degraded=True,
        ),
        Variant((), _LONG_MS, 0, (), before="fsfreeze -f /mnt/data1", after="fsfreeze -u /mnt/data1", is_refused=True),
    ),
    "stranger-thaws": (
        _ended("thaw /mnt/data1", reason="thawed-by-stranger"),
        _ended("thaw /", reason="thawed-by-stranger"),
    ),
    "clock-stepped": tuple(_lease(f"clock {step}", afterwards=(f"clock {-step}",)) for step in STEPS_S),
    "timer-fires": (
        Variant(
            ("await-pid1", "stop guard"),
            _BLOCKED_MS,
            _BLOCKED_MS / 1000 + _GUARD_STOPPED_S,
            ("lease-expired", "guard-lost"),
            before=f"systemctl start {TIMER}",
            after=f"systemctl stop {TIMER}",
        ),
    ),
    "upgraded": (
        _lease("upgrade", after=_UPGRADED),
        Variant(
            ("upgrade",),
            _UPGRADE_MS,
            _UPGRADE_MS / 1000 + 1,
            ("agent-restarted", "guard-lost"),
            after=_UPGRADED,
            mountpoints=DATA,
        ),
    ),
    # Let go of are the writers, after the thaw; of that nobody else can tell the host.
    "rebooted": (Variant(("reboot",), _REBOOT_MS, _REBOOT_MS / 1000 + 1 + _BY_HOST_S, ()),),
}
# Once in BLOCK rounds, the others as often as there is room: these take half a minute.
DEAR = ("upgraded", "rebooted")
