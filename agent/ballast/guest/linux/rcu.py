"""Short grace periods of the kernel's RCU, for a moment: ``kernel/ksysfs.c``, ``kernel/rcu/update.c`` (Linux 4.0 on).

freeze_super() waits for a grace period on each of its three levels, for two of them with the file system's writers
already held up (``percpu_down_write``, ``rcu_sync_enter``). On an idle machine these 10 to 20 ms each are nearly all of
a freeze. With 1 in ``/sys/kernel/rcu_expedited`` the kernel asks every CPU at once instead.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from ballast.guest.linux import settings

SWITCH = Path("/sys/kernel/rcu_expedited")
MARK = settings.MARKS / "rcu-expedited"


def expedite(switch: Path = SWITCH, mark: Path = MARK) -> None:
    """Make grace periods short until ``restore``. Nothing where they are already, or the kernel has no switch."""
    with contextlib.suppress(OSError):
        if switch.read_text().strip() == "0":
            settings.change(mark, {switch: "1"}, {switch: "0"})


def restore(mark: Path = MARK) -> None:
    """As it was before; may be called by anybody, any number of times."""
    with contextlib.suppress(OSError):
        settings.restore(mark)
