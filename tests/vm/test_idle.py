"""What the agent takes of a guest in which nothing happens. Ten minutes of that, with more figures: make idle."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.lab.guest import Guest
from tests.vm.idle import PSS_MAX_BYTES, broken_promises, idle, main_pid, watch
from tests.vm.unit import AGENT

SHORT_S = 60.0


@pytest.mark.parametrize("suite", ["trixie", "bookworm"])
def test_an_idle_agent_is_small_and_wakes_up_for_the_watchdog_only(
    request: pytest.FixtureRequest, suite: str, measured: Callable[[str], None]
) -> None:
    guest: Guest = request.getfixturevalue({"trixie": "guest", "bookworm": "bookworm"}[suite])
    # First as the other tests have left it, and then without a guard that is still to end.
    ((used,), _) = watch(guest, [main_pid(guest, "ballastd")], 0.0)
    guest.run(["systemctl", "restart", AGENT])
    (agent, qga), fed = idle(guest, SHORT_S)
    guest.run(["pkill", "-x", qga.name])
    sizes = ", ".join(f"{one.pss_bytes / 2**20:.1f}" for one in (used, agent, qga))
    measured(f"{suite}, MiB of the agent after the other tests, when new, and of qemu-ga: {sizes}")
    measured(
        f"{suite}, {SHORT_S:.0f} s idle: {agent.wake_ups} wake-ups, {agent.cpu_ms:.0f} ms of CPU; {fed} for systemd"
    )
    assert used.pss_bytes <= PSS_MAX_BYTES[suite]
    assert broken_promises(suite, [agent], fed) == []
