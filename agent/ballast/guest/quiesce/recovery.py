"""After an agent that died in the middle of a freeze: nothing of it is left frozen when its successor begins."""

from __future__ import annotations

import asyncio
import time

from ballast.guest.quiesce.guard_client import GuardConnection
from ballast.guest.quiesce.leftovers import RETRY_S, Leftover, is_running, thaw_leftovers
from ballast.guest.quiesce.record import Open
from ballast.guest.threads import in_thread
from ballast.wire.errors import AgentError

_DEADLINE_S, _GREETING_S = 60.0, 2.0


async def clean_up(left: Open, guard_path: str) -> list[Leftover]:
    """Thaw what an earlier agent left: what can be thawed at once, and again when its guard has nothing more to do.

    A guard that lives says "busy" while a freeze of its own still waits for a writer, and then thaws that itself.
    """
    found = await in_thread(lambda: thaw_leftovers(left, deadline_s=0), name="quiesce-leftovers")
    deadline_s = time.monotonic() + _DEADLINE_S
    while is_running(left) and time.monotonic() < deadline_s:
        try:
            (await GuardConnection.open(guard_path, timeout_s=_GREETING_S)).close()
            break
        except AgentError:
            await asyncio.sleep(RETRY_S)
    return found + await in_thread(lambda: thaw_leftovers(left, deadline_s=0), name="quiesce-leftovers")
