"""One trigger of the kernel's on a pressure file (Documentation/accounting/psi.rst), in the event loop.

It fires at most once a window and shows as POLLPRI, which asyncio's own selector does not ask for: each trigger lives
in an epoll of its own, itself watched by the event loop. To look at a trigger is to use up its event (psi_trigger_poll
in kernel/sched/psi.c), and the loop's epoll looks through ours: that ours is readable is all there will be to see, and
asking it again finds nothing. So there is one for each trigger.
"""

from __future__ import annotations

import asyncio
import os
import select
from collections.abc import Callable
from pathlib import Path

from ballast.guest.linux import psi
from ballast.wire.memory_names import PsiTrigger


class Trigger:
    """Calls ``fired`` from the event loop, or ``gone`` when the control group of its file was removed."""

    def __init__(
        self, path: Path, wanted: PsiTrigger, fired: Callable[[], None], gone: Callable[[], None] = lambda: None
    ) -> None:
        """Arm it. OSError as of ``psi.open_trigger``. Never blocks."""
        self._fired, self._gone = fired, gone
        self._fd = psi.open_trigger(path, wanted.kind, stall_us=wanted.stall_us, window_us=wanted.window_us)
        self._epoll = select.epoll()
        try:
            self._epoll.register(self._fd, select.EPOLLPRI)
        except OSError:  # EPERM: no file of the kernel's
            self._epoll.close()
            os.close(self._fd)
            raise
        asyncio.get_running_loop().add_reader(self._epoll.fileno(), self._look)

    def close(self) -> None:
        """Disarm it; again is no error."""
        if not self._epoll.closed:
            asyncio.get_running_loop().remove_reader(self._epoll.fileno())
            self._epoll.close()
            os.close(self._fd)

    def _look(self) -> None:
        if self._epoll.closed:
            return
        # Of a removed group it is an error for ever, and would be readable for ever.
        if any(event & select.EPOLLERR for _, event in self._epoll.poll(0)):
            self.close()
            self._gone()
        else:
            self._fired()
