"""Ballast in less than three minutes, live: python -m tests.lab.demo [--keep]

A Debian 13 guest with 1 GiB and three data disks boots under QEMU, and the packages of dist/ are installed in it. Then,
over vsock: memory pressure arrives as an event; 512 MiB are plugged in and online; four file systems are frozen under
writers, snapshotted by QMP and thawed; the snapshot's file systems are clean; the DIMM and 256 MiB of boot memory go
back to the host, and the guest takes those again when load returns. Everything is measured while it runs. The exit
status is 0 only if all of it happened, and nothing is left behind. It needs root, to mount the snapshot.
"""

import argparse
import asyncio
import os
import secrets
import signal
import statistics
import sys
import time
from contextlib import suppress
from pathlib import Path

from ballast.host.agent import Agent
from ballast.host.show import Table
from ballast.wire.errors import AgentError, Unauthenticated
from tests.lab import image
from tests.lab.demo_give_back import show_balloon, show_return, show_unplug
from tests.lab.demo_memory import Ear, show_hot_add, show_pressure
from tests.lab.demo_snapshot import show_clean, show_freeze, show_writers
from tests.lab.demo_stage import DemoFailed, Screen, Stage, read_clock, require
from tests.lab.guest import BootFailed, CommandFailed, Guest, QmpError

DIST = Path(__file__).parents[2] / "dist"
DISKS = (("ext4", 512 << 20), ("xfs", 512 << 20), ("btrfs", 512 << 20))
MEMORY_BYTES = 1 << 30
PINGS = 20


def packages() -> list[Path]:
    """What goes into the guest. DemoFailed if it is not built."""
    found = [deb for name in ("ballast-common", "ballast-agent") for deb in DIST.glob(f"{name}_*.deb")]
    require(len(found) == 2, "dist/ has no packages, or those of two versions: run `make packages`")
    return found


async def show_boot(guest: Guest, screen: Screen, started_s: float) -> None:
    """From nothing to an installed agent."""
    with screen.working("booting Debian 13 under QEMU, in software (TCG)"):
        await asyncio.to_thread(guest.wait_boot)
    boot_s = time.monotonic() - started_s
    with screen.working("installing ballast-common and ballast-agent with dpkg"):
        installing_s = time.monotonic()
        await asyncio.to_thread(guest.install, packages())
        install_s = time.monotonic() - installing_s
    versions = (await asyncio.to_thread(guest.run, "cat /etc/debian_version; uname -r")).stdout.split()
    qemu = guest.qmp("query-version")["qemu"]
    screen.say(
        f"Debian {versions[0]}, Linux {versions[1]}, on QEMU {qemu['major']}.{qemu['minor']}.{qemu['micro']}; root "
        f"and three data disks ({', '.join(type_ for type_, _ in DISKS)})."
    )
    screen.say(
        f"Up after [bold]{boot_s:.0f} s[/], packages installed in {install_s:.0f} s: "
        f"{', '.join(deb.stem.removesuffix('_all') for deb in packages())}."
    )
    screen.sum_up("boot", f"{boot_s:.0f} s")


async def ping_ms(agent: Agent) -> float:
    """The median of a few round trips."""
    times_s = []
    for _ in range(PINGS):
        asked_s = time.perf_counter()
        await agent.guest_ping()
        times_s.append(time.perf_counter() - asked_s)
    return 1000 * statistics.median(times_s)


async def show_transports(screen: Screen, vsock: str, serial: str, token: str) -> None:
    """Which ways lead to the agent, and who may use them."""
    async with Agent.connect(vsock) as stranger:
        status = await stranger.status()
        try:
            await stranger.memory_status()
        except Unauthenticated:
            screen.say("vsock without the token: shakes hands and is refused the rest.")
        else:
            require(False, "vsock answers without the token")
    async with Agent.connect(vsock, token) as agent:
        vsock_ms = await ping_ms(agent)
    async with Agent.connect(serial) as agent:
        await agent.memory_status()
        serial_ms = await ping_ms(agent)
    screen.say(
        f"vsock, authenticated by token: answers, ping [bold]{vsock_ms:.1f} ms[/]. "
        f"virtio-serial: answers, ping [bold]{serial_ms:.1f} ms[/]."
    )
    screen.say(
        f"ballastd {status.version}, protocol {status.protocol}, {status.rss_bytes / (1 << 20):.0f} MiB resident."
    )
    screen.sum_up("transports", f"vsock {vsock_ms:.1f} ms, virtio-serial {serial_ms:.1f} ms a ping")


async def play(screen: Screen, *, keep: bool) -> None:
    """All of it, in order. Whatever is raised here, the guest and its files are gone afterwards."""
    token = secrets.token_hex(16)
    packages()
    built = image.build("trixie")
    screen.step("1. A guest: Debian 13, 1 GiB, three data disks")
    started_s = time.monotonic()
    with Guest(built, disks=DISKS, token=token, memory_bytes=MEMORY_BYTES) as guest:
        vsock, serial = f"unix:{guest.vsock_path}?connect=640", f"unix:{guest.ballast_port}"
        await show_boot(guest, screen, started_s)
        await show_transports(screen, vsock, serial, token)
        async with Agent.connect(vsock, token) as agent:
            await show_all(Stage(guest, agent, screen))
        screen.table(Table(f"All of it happened, in {screen.elapsed_s:.0f} s", screen.summary))
        if keep:
            await stay(guest, screen, token)


async def show_all(stage: Stage) -> None:
    """What the agent does."""
    stage.screen.step("2. Memory pressure is an event")
    ear = Ear(stage.agent)
    await show_pressure(stage, ear, await asyncio.to_thread(read_clock, stage.guest))
    stage.screen.step("3. 512 MiB plugged in under that load")
    await show_hot_add(stage, ear)
    stage.screen.step("4. A snapshot of four file systems under writers")
    await show_writers(stage)
    done = await show_freeze(stage)
    stage.screen.step("5. What the snapshot holds")
    await show_clean(stage, done)
    stage.screen.step("6. The DIMM goes back")
    await show_unplug(stage)
    stage.screen.step("7. 256 MiB of boot memory go back")
    await show_balloon(stage)
    stage.screen.step("8. Load returns, and the memory with it")
    await show_return(stage, ear)


async def stay(guest: Guest, screen: Screen, token: str) -> None:
    """Leave the guest running until Ctrl-C."""
    file = guest.dir / "demo-token"
    file.touch(mode=0o600)
    file.write_text(token)
    screen.say("The guest stays until Ctrl-C. Try, from another terminal:")
    screen.show(f".venv/bin/ballastctl status 'unix:{guest.vsock_path}?connect=640' --token-file {file}")
    screen.show(f".venv/bin/ballastctl watch unix:{guest.ballast_port}")
    screen.show(f".venv/bin/ballastctl freeze unix:{guest.ballast_port} -- sleep 2")
    with suppress(asyncio.CancelledError):  # that is how it ends well
        await asyncio.Event().wait()


async def run(screen: Screen, *, keep: bool) -> None:
    """Play; SIGTERM ends it as Ctrl-C does."""
    task = asyncio.current_task()
    assert task
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    await play(screen, keep=keep)


def main() -> None:
    """Parse the command line, play, and turn what went wrong into words."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.lab.demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--keep", action="store_true", help="leave the guest running, to try ballastctl on it")
    keep = parser.parse_args().keep
    if os.geteuid() != 0:
        sys.exit("demo: needs root, to mount the snapshot that it checks")
    screen = Screen()
    try:
        asyncio.run(run(screen, keep=keep))
    except (KeyboardInterrupt, asyncio.CancelledError):
        sys.exit("demo: stopped")
    except (DemoFailed, AgentError, BootFailed, CommandFailed, QmpError, OSError) as error:
        sys.exit(f"demo: FAILED after {screen.elapsed_s:.0f} s: {error}")


if __name__ == "__main__":
    main()
