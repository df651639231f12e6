"""Short grace periods of the kernel's RCU, for a moment: ``kernel/ksysfs.c``, ``kernel/rcu/update.c`` (Linux 4.0 on).

freeze_super() waits for a grace period on each of its three levels, for two of them with the file system's writers
already held up (``percpu_down_write``, ``rcu_sync_enter``). On an idle machine these 10 to 20 ms each are nearly all of
a freeze. With 1 in ``/sys/kernel/rcu_expedited`` the kernel asks every CPU at once instead. The switch is the whole
system's, so a mark on a tmpfs says that it was us who turned it: whoever finds it there turns it back.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

SWITCH = Path("/sys/kernel/rcu_expedited")
MARK = Path("/run/ballast/rcu-expedited")


def expedite(switch: Path = SWITCH, mark: Path = MARK) -> None:
    """Make grace periods short until ``restore``. Nothing where they are already, or the kernel has no switch."""
    with contextlib.suppress(OSError):
        if switch.read_text().strip() == "0":
            mark.touch()
            switch.write_text("1")


def restore(switch: Path = SWITCH, mark: Path = MARK) -> None:
    """As it was before; may be called by anybody, any number of times."""
    with contextlib.suppress(OSError):
        if mark.exists():
            switch.write_text("0")
            mark.unlink()
