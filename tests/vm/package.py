"""The packages in a guest: which version is there, changing it, and what is left of them."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from tests.lab.guest import Guest, Result
from tests.vm.conftest import packages

FOLDER = "/run/install"
DPKG_TIMEOUT_S = 240

# Names with "ballast" in them; contents, where systemd, udev and dpkg keep what they know; units; processes; sockets.
# The host's port itself is called org.ballast.agent.0. dpkg's own log and backup are its memory, not ours.
_TRACES = """
find / /run -xdev -iname '*ballast*' -not -name '*org.ballast.agent.0'
grep -rl ballast /etc /run/systemd /var/lib/systemd /var/lib/dpkg/info /var/lib/dpkg/status || true
grep -rl ballast- /run/udev || true
systemctl list-units --all --no-legend 'ballast*'
systemctl list-unit-files --no-legend 'ballast*' || true
ps -eo args | grep '[/]ballast' || true
grep ballast /proc/net/unix || true
"""


def version_of(folder: Path) -> str:
    """The version that lies there."""
    return packages(folder)[0].name.split("_")[1]


def installed(guest: Guest) -> str:
    """The agent's version in the guest; empty if it is not installed."""
    query = ["dpkg-query", "--show", "--showformat", "${db:Status-Status} ${Version}", "ballast-agent"]
    status, _, version = guest.run(query, check=False).stdout.partition(" ")
    return version if status == "installed" else ""


def put(guest: Guest, folder: Path) -> list[str]:
    """Copy the packages that lie there into the guest, onto a tmpfs; where they are."""
    for deb in packages(folder):
        guest.put(f"{FOLDER}/{deb.name}", deb.read_bytes())
    return [f"{FOLDER}/{deb.name}" for deb in packages(folder)]


def dpkg(guest: Guest, *arguments: str) -> Result:
    """Run dpkg, with nobody to answer its questions."""
    return guest.run(["dpkg", *arguments], timeout_s=DPKG_TIMEOUT_S)


def bring(guest: Guest, folder: Path) -> None:
    """Have that version in the guest, whatever there is."""
    if installed(guest) != version_of(folder):
        dpkg(guest, "--install", *put(guest, folder))


@contextmanager
def dpkg_running(guest: Guest, *arguments: str) -> Iterator[Future[Result]]:
    """Run dpkg beside the block, and wait for its end."""
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(dpkg, guest, *arguments)
        yield running
        running.result()


def traces(guest: Guest) -> str:
    """Whatever of ours there is to be found, but for packages that wait to be installed."""
    guest.run(["rm", "-rf", FOLDER])
    return guest.run(_TRACES, timeout_s=120).stdout
