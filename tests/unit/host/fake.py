"""A fake agent: a real UNIX socket server in the test's own loop, speaking lines of plain JSON."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

DEADLINE_S = 10.0

FILESYSTEM = {"mountpoint": "/data", "device": "/dev/vdb", "type": "ext4", "state": "frozen", "freeze-ms": 12.5}
STATUS = {
    "version": "0.1.0",
    "protocol": 1,
    "features": ["memory", "quiesce"],
    "boot-id": "b0",
    "page-size-bytes": 4096,
    "limits": {"lease-ms": 600_000, "chunk-bytes": 67_108_864, "line-bytes": 1_048_576, "from-the-future": 1},
    "uptime-ms": 5000,
    "peers": 1,
    "rss-bytes": 21_000_000,
    "psi": True,
    "pin": None,
    "guard": "stopped",
    "holder": "stopped",
    "from-the-future": {"x": 1},
}
STALL = {"avg10": 1.5, "avg60": 0.5, "avg300": 0, "total-us": 123}
MEMORY = {
    "boot-id": "b0",
    "total-bytes": 1 << 30,
    "available-bytes": 1 << 29,
    "free-bytes": 1 << 28,
    "cached-bytes": 1 << 27,
    "committed-bytes": 1 << 28,
    "swap-total-bytes": 0,
    "swap-free-bytes": 0,
    "psi": {"some": STALL, "full": STALL},
    "level": "low",
    "demand-bytes": 300_000_000,
    "demand": {"anon": 300_000_000},
    "balloon": {"bytes": 0, "target-bytes": 0},
    "blocks": {"size-bytes": 1 << 27, "online": 8, "offline": 4, "movable-online": 0},
    "kernel-balloon": None,
}
THAWED = {"state": "thawed", "filesystems": []}
FORECAST = {
    "order": [["/mnt/loop"], ["/", "/data"]],
    "skip": [{"mountpoint": "/boot/efi", "reason": "vfat cannot be frozen"}],
    "risks": [{"kind": "fanotify", "detail": "scanner (812) has to permit"}, {"kind": "of-later", "detail": "x"}],
    "dirty-bytes": 3 << 20,
}
ENDED = {"held": True, "held-ms": 1234.5, "thaw-ms": 3.5, "filesystems": [], "writers": []}


def begun(arguments: dict[str, Any]) -> dict[str, Any]:
    """Answer to ballast-quiesce-begin."""
    return {
        "id": arguments["id"],
        "consistency": "filesystem",
        "lease-ms": arguments["lease-ms"],
        "sync-ms": 1.5,
        "freeze-ms": 20,
        "filesystems": [FILESYSTEM],
        "writers": [],
    }


@dataclass
class Refusal(Exception):
    """An error to answer with."""

    reason: str | None = None
    desc: str = "no"
    wire_class: str = "GenericError"
    data: dict[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        data = self.data | ({"reason": self.reason} if self.reason else {})
        return {"class": self.wire_class, "desc": self.desc, "data": data}


# What to do with a command: a value, an error, or a function of the arguments that gives either, at once or later.
Answer = Callable[[dict[str, Any]], Any] | Refusal | dict[str, Any] | list[Any] | str | int | None


class FakeAgent:
    """Answers as told, and tells what it was asked. One object for all connections to it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.target = f"unix:{path}"
        self.answers: dict[str, Answer] = {
            "guest-ping": {},
            "ballast-agent-status": STATUS,
            "ballast-memory-status": MEMORY,
            "ballast-quiesce-status": THAWED,
            "ballast-quiesce-forecast": FORECAST,
            "ballast-quiesce-begin": begun,
            "ballast-quiesce-renew": lambda arguments: {"lease-ms": arguments["lease-ms"]},
            "ballast-quiesce-end": ENDED,
            "ballast-subscribe": {},
            "ballast-authenticate": {},
        }
        self.greeting = b""
        self.loop = asyncio.get_running_loop()
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.writers: list[asyncio.StreamWriter] = []
        self._changed = asyncio.Event()
        self._serving: set[asyncio.Task[None]] = set()

    def count(self, command: str) -> int:
        """How often it was asked for ``command``."""
        return sum(name == command for name, _ in self.asked)

    async def wait_for(self, command: str, times: int = 1) -> dict[str, Any]:
        """Wait until it was asked for ``command``; the arguments of the last time."""
        async with asyncio.timeout(DEADLINE_S):
            while self.count(command) < times:
                self._changed.clear()
                await self._changed.wait()
        return [arguments for name, arguments in self.asked if name == command][-1]

    def send(self, data: bytes | dict[str, Any]) -> None:
        """Say something that nobody asked for, on the newest connection."""
        self.writers[-1].write(data if isinstance(data, bytes) else json.dumps(data).encode() + b"\n")

    def send_event(self, seq: int, name: str = "BALLAST_PRESSURE", **data: Any) -> None:
        """Send an event."""
        stamp = {"seconds": 1_700_000_000, "microseconds": 250_000}
        self.send({"event": name, "data": data, "seq": seq, "timestamp": stamp})

    def drop(self) -> None:
        """Close every connection."""
        for writer in self.writers:
            writer.transport.abort()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, each request answered when its answer is there."""
        self.writers.append(writer)
        writer.write(self.greeting)
        with contextlib.suppress(OSError):
            while line := await reader.readline():
                before, _, request = line.rpartition(b"\xff")
                if before or line.startswith(b"\xff"):
                    error = {"class": "GenericError", "desc": "JSON parse error, stray '\ufffd'"}
                    writer.write(json.dumps({"error": error}).encode() + b"\n")
                if request.strip():
                    answering = asyncio.create_task(self._answer(json.loads(request), writer))
                    self._serving.add(answering)
                    answering.add_done_callback(self._serving.discard)
        writer.transport.abort()

    async def _answer(self, request: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        command, arguments = request["execute"], request["arguments"]
        self.asked.append((command, arguments))
        self._changed.set()
        echo = {"id": request["id"]}
        try:
            reply = {"return": await self._result(command, arguments)} | echo
        except Refusal as refusal:
            reply = {"error": refusal.as_json()} | echo
        prefix = b"\xff" if command == "guest-sync-delimited" else b""
        writer.write(prefix + json.dumps(reply).encode() + b"\n")

    async def _result(self, command: str, arguments: dict[str, Any]) -> Any:
        if command == "guest-sync-delimited" and command not in self.answers:
            return arguments["id"]
        if command not in self.answers:
            raise Refusal(None, f"The command {command} has not been found", "CommandNotFound")
        answer = self.answers[command]
        value = answer(arguments) if callable(answer) else answer
        if isinstance(value, Awaitable):
            value = await value
        if isinstance(value, Refusal):
            raise value
        return value


@contextlib.asynccontextmanager
async def serve(path: Path) -> AsyncIterator[FakeAgent]:
    """A fake agent that listens on ``path``."""
    fake = FakeAgent(path)
    server = await asyncio.start_unix_server(fake.serve, path)
    try:
        yield fake
    finally:
        server.close()
        fake.drop()
        for answering in list(fake._serving):
            answering.cancel()
        await asyncio.wait_for(server.wait_closed(), DEADLINE_S)


@contextlib.contextmanager
def serve_in_thread(path: Path) -> Iterator[FakeAgent]:
    """A fake agent with a loop of its own, for what runs a loop itself."""
    started: concurrent.futures.Future[tuple[FakeAgent, asyncio.Event]] = concurrent.futures.Future()

    async def run() -> None:
        async with serve(path) as fake:
            done = asyncio.Event()
            started.set_result((fake, done))
            await done.wait()

    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        ended = thread.submit(asyncio.run, run())
        fake, done = started.result(DEADLINE_S)
        loop = fake.loop
        try:
            yield fake
        finally:
            loop.call_soon_threadsafe(done.set)
            ended.result(DEADLINE_S)
