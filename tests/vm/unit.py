"""The agent's unit in the guest: what its process uses, and running it with another configuration or another code."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from tests.lab.guest import Guest

AGENT = "ballast-agent.service"
PACKAGE = "/usr/lib/ballast"
DROP_IN = "/etc/ballast/agent.d/test.toml"
MUTANT, MUTANT_UNIT = "/run/mutant", f"/run/systemd/system/{AGENT}.d/mutant.conf"

# VmRSS in KiB, descriptors, user and system time in ticks.
_USAGE = """
pid=$(systemctl show --property=MainPID --value {unit})
echo $pid
grep VmRSS: /proc/$pid/status | tr -dc 0-9; echo
ls /proc/$pid/fd | wc -l
sed 's/.*) //' /proc/$pid/stat | cut -d' ' -f12,13
"""


@dataclass(frozen=True, slots=True)
class Usage:
    """What the agent's process has and has used."""

    pid: int
    rss_bytes: int
    descriptors: int
    cpu_ticks: int


def usage(guest: Guest) -> Usage:
    """The agent's, now; by reading /proc in the guest, without asking the agent."""
    pid, rss_kib, descriptors, *ticks = guest.run(_USAGE.format(unit=AGENT)).stdout.split()
    return Usage(int(pid), int(rss_kib) * 1024, int(descriptors), sum(map(int, ticks)))


def show(guest: Guest, name: str, unit: str = AGENT) -> str:
    """A property of a unit."""
    return guest.run(["systemctl", "show", f"--property={name}", "--value", unit]).stdout.strip()


@contextmanager
def configured(guest: Guest, toml: str) -> Iterator[None]:
    """The agent with a further configuration file, and then again without."""
    guest.put(DROP_IN, toml.encode())
    try:
        guest.run(["systemctl", "restart", AGENT])
        yield
    finally:
        guest.run(f"rm {DROP_IN}; systemctl restart {AGENT}")


@contextmanager
def mutant(guest: Guest, file: str, old: str, new: str) -> Iterator[None]:
    """The agent from a copy of its package in which `old` reads `new`, once; and then the true one again."""
    guest.run(
        f"rm -rf {MUTANT}; cp -r {PACKAGE} {MUTANT}; sed 's|{PACKAGE}|{MUTANT}|' /usr/sbin/ballastd >{MUTANT}/ballastd"
    )
    code = guest.get(f"{MUTANT}/{file}").decode()
    assert code.count(old) == 1, f"{file} no longer says {old!r} once"
    guest.put(f"{MUTANT}/{file}", code.replace(old, new).encode())
    guest.put(MUTANT_UNIT, f"[Service]\nExecStart=\nExecStart=/usr/bin/python3 -IB {MUTANT}/ballastd\n".encode())
    try:
        guest.run(f"systemctl daemon-reload; systemctl restart {AGENT}")
        yield
    finally:
        guest.run(f"rm -r {MUTANT} {MUTANT_UNIT}; systemctl daemon-reload; systemctl restart {AGENT}")
