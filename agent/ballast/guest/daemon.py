"""ballastd: builds every object by hand and runs them in one task group.

Order: arguments, configuration, log, objects, start, then READY; SIGTERM thaws first. The only file that imports
everything.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

from ballast import __version__
from ballast.guest.bus import Bus
from ballast.guest.commands.agent import AgentCommands, Sources
from ballast.guest.commands.memory import MemoryCommands
from ballast.guest.commands.quiesce import QuiesceCommands
from ballast.guest.config import Config, ConfigError, read_config
from ballast.guest.dispatch import Table
from ballast.guest.events import Events
from ballast.guest.linux.notify import notify
from ballast.guest.linux.tree import Tree
from ballast.guest.linux.uevents import UeventSocket
from ballast.guest.memory import kernel_online
from ballast.guest.memory.balloon import Balloon
from ballast.guest.memory.balloon_watch import BalloonWatch
from ballast.guest.memory.blocks import Blocks
from ballast.guest.memory.decisions import Decisions
from ballast.guest.memory.holder_client import holder_state, pin
from ballast.guest.memory.holder_protocol import CHUNK_BYTES
from ballast.guest.memory.hotplug import Hotplug
from ballast.guest.memory.leaving import Leaving
from ballast.guest.memory.level import PressureLevel
from ballast.guest.memory.offline import Offline
from ballast.guest.memory.onliners import Onliners
from ballast.guest.memory.pressure import Pressure
from ballast.guest.memory.relief import Relief
from ballast.guest.memory.sleep import SleepLock
from ballast.guest.memory.status import MemoryFacts
from ballast.guest.peer import Bounds, Peers
from ballast.guest.quiesce.outlook import LEASE_MAX_MS
from ballast.guest.quiesce.services import Services
from ballast.guest.quiesce.session import Quiesce
from ballast.guest.quiesce.writer import Writer
from ballast.guest.quiesce.writer_files import find_writers
from ballast.guest.quiesce.writer_process import WriterProcess
from ballast.guest.service import dbus
from ballast.guest.service.systemd import JournalHandler, feed_watchdog, passed_sockets, read_credential
from ballast.guest.transports import unix, virtio_serial, vsock
from ballast.wire import names
from ballast.wire.message import LINE_LIMIT_BYTES

log = logging.getLogger("ballast")

EXIT_CONFIG = 78  # EX_CONFIG of sysexits.h; the unit does not restart on it
_PRIVILEGED_PORT = 1024
_TOKEN_MIN_BYTES = 16


class Daemon:
    """All that lives as long as the agent."""

    def __init__(self, config: Config, tree: Tree, config_path: Path) -> None:
        self._config = config
        self._tree = tree
        self._started_s = time.monotonic()
        self._port_changed = asyncio.Event()
        self._boot_id = tree.read("proc/sys/kernel/random/boot_id")
        self._level = PressureLevel(tree, config.pressure, lambda level: self._dbus.set_level(level))
        self._pressure = Pressure(tree, self._level, max_triggers=config.limits.triggers)
        bus = Bus(dbus.NAME, is_frozen=lambda: self._quiesce.is_frozen)
        self._services = Services(bus, is_frozen=lambda: self._quiesce.is_frozen)
        self._events = events = Events()
        self._decisions = decisions = Decisions()
        self._quiesce = Quiesce(tree, events, config, self._find_writers)
        self._balloon = Balloon(tree, events, decisions, boot_id=self._boot_id, mode=config.memory.balloon)
        lock = SleepLock(self._balloon.give_back_before_sleep, is_frozen=lambda: self._quiesce.is_frozen)
        self._watch = BalloonWatch(self._balloon, events, lock)
        self._relief = Relief(self._balloon, self._pressure, events, decisions)
        blocks = Blocks(tree, lambda: self._balloon.bytes, decisions)
        leaving = Leaving()
        self._hotplug = Hotplug(blocks, leaving, events, Onliners(tree), online=config.memory.online != "off")
        facts = MemoryFacts(tree, self._level, blocks, self._balloon, boot_id=self._boot_id)
        policy = config.policy
        table = Table(is_frozen=lambda: self._quiesce.is_frozen, allow=policy.allow, block=policy.block)
        limits = config.limits
        bounds = Bounds(limits.queue_bytes, limits.write_timeout_ms / 1000)
        self._peers = Peers(table, bounds, most=limits.peers)
        sources = Sources(self._pressure.watch, facts.report_every)
        token = _read_token()
        table.add(AgentCommands(table, events, sources, version=__version__, token=token, read_status=self.status))
        table.add(MemoryCommands(facts, blocks, Offline(tree, blocks, leaving, decisions), self._balloon, decisions))
        table.add(QuiesceCommands(self._quiesce))
        self._dbus = dbus.Dbus(
            bus, events, table.answer, self._services, version=__version__, balloon_bytes=lambda: self._balloon.bytes
        )
        if table.unknown:
            raise ConfigError(config_path, "policy", f"no such commands: {', '.join(table.unknown)}")

    def status(self) -> names.AgentStatus:
        """``ballast-agent-status``."""
        page_size_bytes = os.sysconf("SC_PAGESIZE")
        resident_pages = int(self._tree.read("proc/self/statm").split()[1])
        return names.AgentStatus(
            version=__version__,
            protocol=names.PROTOCOL,
            features=["memory", "balloon", "quiesce"],
            boot_id=self._boot_id,
            page_size_bytes=page_size_bytes,
            limits=names.Limits(LEASE_MAX_MS, CHUNK_BYTES, LINE_LIMIT_BYTES),
            uptime_ms=round(1000 * (time.monotonic() - self._started_s)),
            peers=len(self._peers),
            rss_bytes=resident_pages * page_size_bytes,
            psi=self._pressure.is_available,
            pin=pin(self._tree),
            guard=self._quiesce.guard_state(),
            holder=holder_state(self._tree, self._balloon.bytes),
        )

    async def run(self) -> None:
        """Serve until SIGTERM or SIGINT; what is frozen is thawed before this returns."""
        loop = asyncio.get_running_loop()
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        uevents = UeventSocket("memory", "virtio-ports")
        async with asyncio.TaskGroup() as group:
            await self._balloon.recover()
            kernel_online.arrange(self._tree, self._decisions, is_wanted=self._config.memory.online == "kernel")
            parts = [
                self._quiesce.run(),
                self._hotplug.run(),
                self._relief.run(),
                self._watch.run(),
                feed_watchdog(),
                *self._transports(),
            ]
            parts += [self._hear(uevents), self._level.run(self._events)]
            if self._config.dbus.enabled:
                parts += [self._dbus.run(), self._services.run(self._quiesce.wait_recovered)]
            tasks = [group.create_task(part) for part in parts]
            notify("READY=1")
            log.info("ballastd %s is ready", __version__)
            await stop.wait()
            notify("STOPPING=1")
            await self._quiesce.close()
            await self._balloon.close()
            for task in tasks:
                task.cancel()

    def _transports(self) -> list[Coroutine[Any, Any, None]]:
        """One serving coroutine for each transport that is configured and there."""
        settings = self._config.transports
        serving = []
        listener = passed_sockets().get(socket.AF_VSOCK)
        if settings.vsock and listener is not None:
            serving.append(self._peers.serve(vsock.accept(listener), self._describe_vsock))
        if settings.unix:
            listener = unix.listen(Path(settings.unix))
            serving.append(self._peers.serve(unix.accept(listener), lambda _: ("unix", True)))
        if name := settings.virtio_serial:
            ports = virtio_serial.accept(lambda: virtio_serial.find_port(name), self._next_port_change)
            serving.append(self._peers.serve(ports, lambda _: ("virtio-serial", True)))
        return serving

    def _describe_vsock(self, writer: asyncio.StreamWriter) -> tuple[str, bool]:
        cid, port = writer.get_extra_info("peername")
        trusted = self._config.transports.trust_privileged_port and port < _PRIVILEGED_PORT
        return f"vsock:{cid}:{port}", trusted

    async def _hear(self, uevents: UeventSocket) -> None:
        loop, said = asyncio.get_running_loop(), asyncio.Event()
        while True:
            said.clear()
            loop.add_reader(uevents.fileno(), said.set)
            await said.wait()
            loop.remove_reader(uevents.fileno())
            await self._hotplug.wait_to_hear()
            for uevent in uevents.read():
                if uevent is None or uevent.subsystem == "memory":
                    self._hotplug.hear(uevent)
                if uevent is None or uevent.subsystem == "virtio-ports":
                    self._port_changed.set()

    async def _next_port_change(self) -> None:
        self._port_changed.clear()
        await self._port_changed.wait()

    def _find_writers(self) -> list[Writer]:
        """A service that is there takes the place of a program with its name."""
        programs: dict[str, Writer] = {path.name: WriterProcess(path) for path in find_writers()}
        return list((programs | {service.name: service for service in self._services.writers()}).values())


def _read_token() -> bytes | None:
    token = read_credential("ballast.token")
    if token is not None and len(token) < _TOKEN_MIN_BYTES:
        log.error(
            "the credential ballast.token is shorter than %d bytes, ignoring: vsock stays read-only", _TOKEN_MIN_BYTES
        )
        return None
    return token


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="ballastd",
        description="Ballast's guest agent: memory that breathes, file systems that freeze under a lease.",
        epilog="Run by systemd as ballast-agent.service. Example: ballastd --check --config ./agent.toml",
    )
    parser.add_argument("--config", type=Path, default=Path("/etc/ballast/agent.toml"), metavar="FILE")
    parser.add_argument(
        "--check", action="store_true", help="read the configuration, say whether it is right, and leave"
    )
    parser.add_argument("--version", action="version", version=f"ballastd {__version__}")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the agent. Exit status 0 after SIGTERM, 78 for a wrong configuration, 1 for what else stops the start."""
    options = parse_arguments(arguments)
    try:
        config = read_config(options.config, options.config.parent / "agent.d")
    except (ConfigError, OSError) as error:
        sys.stderr.write(f"ballastd: {error}\n")
        return EXIT_CONFIG
    if options.check:
        return 0
    if os.geteuid() != 0:
        sys.stderr.write("ballastd: must run as root: it freezes file systems and brings memory online\n")
        return 1
    sys.dont_write_bytecode = True  # the root file system can be frozen at any time
    handler = JournalHandler()
    logging.basicConfig(level=config.agent.log_level.upper(), handlers=[handler], format="%(message)s")
    # What is loaded stays: the garbage collector need not look through it again, for 10 ms, while writers wait.
    gc.freeze()
    try:
        asyncio.run(_run(config, options.config))
    except ConfigError as error:
        sys.stderr.write(f"ballastd: {error}\n")
        return EXIT_CONFIG
    finally:
        logging.shutdown()
    return 0


async def _run(config: Config, config_path: Path) -> None:
    await Daemon(config, Tree(), config_path).run()


if __name__ == "__main__":
    sys.exit(main())
