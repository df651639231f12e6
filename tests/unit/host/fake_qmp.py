"""A fake QEMU: a QMP server as far as DIMMs go. Memory, which only a real one has, is tested in tests/kernel."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.unit.host.fake import DEADLINE_S

GREETING = {"QMP": {"version": {"qemu": {"micro": 2, "minor": 0, "major": 10}, "package": ""}, "capabilities": []}}
BASE = 4 << 30


class FakeQemu:
    """Has objects and DIMMs; ``refuse`` names commands that fail, ``unplug_event`` is what device_del leads to."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.objects: dict[str, int] = {"ram": 1 << 30}
        self.dimms: dict[str, str] = {}
        self.refuse: dict[str, str] = {}
        self.unplug_event: str | None = "DEVICE_DELETED"
        self.asked: list[str] = []

    def plug(self, name: str, bytes_: int) -> None:
        """A DIMM that is there already."""
        self.objects[name] = bytes_
        self.dimms[name] = name

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection."""
        writer.write(json.dumps(GREETING).encode() + b"\r\n")
        said = ""
        while data := await reader.read(1 << 16):
            said += data.decode()
            while said := said.lstrip():  # no newline ends a request
                request, end = json.JSONDecoder().raw_decode(said)
                said = said[end:]
                self._answer(request, writer)
        writer.close()

    def _answer(self, request: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        command, arguments = request["execute"], request.get("arguments", {})
        self.asked.append(command)
        answers: list[dict[str, Any]] = [{"id": request["id"]} if "id" in request else {}]
        if command in self.refuse:
            answers[0]["error"] = {"class": "GenericError", "desc": self.refuse[command]}
        else:
            answers[0]["return"] = self._run(command, arguments)
        if command == "device_del" and self.unplug_event:
            stamp = {"seconds": 1, "microseconds": 2}
            for device in ("other", arguments["id"]):
                data = {"device": device, "path": "/x"}
                answers.append({"event": self.unplug_event, "data": data, "timestamp": stamp})
        for answer in answers:
            writer.write(json.dumps(answer).encode() + b"\r\n")

    def _run(self, command: str, arguments: dict[str, Any]) -> Any:
        if command == "qom-list":
            names = self.objects if arguments["path"] == "/objects" else self.dimms
            return [{"name": name, "type": "x"} for name in names]
        if command == "query-memory-devices":
            return [{"type": "dimm", "data": one} for one in self._devices()] + [{"type": "nvdimm", "data": {}}]
        if command == "object-add":
            self.objects[arguments["id"]] = arguments["size"]
            assert (arguments["qom-type"], arguments["share"]) == ("memory-backend-memfd", True)
        elif command == "object-del":
            del self.objects[arguments["id"]]
        elif command == "device_add":
            assert arguments["driver"] == "pc-dimm"
            self.dimms[arguments["id"]] = arguments["memdev"]
        elif command == "device_del" and self.unplug_event == "DEVICE_DELETED":
            del self.dimms[arguments["id"]]
        return {}

    def _devices(self) -> Iterator[dict[str, Any]]:
        address = BASE
        for name, memdev in self.dimms.items():
            yield {"id": name, "addr": address, "size": self.objects[memdev], "memdev": f"/objects/{memdev}"}
            address += self.objects[memdev]


@contextlib.contextmanager
def serve_in_thread(path: Path) -> Iterator[FakeQemu]:
    """A fake QEMU with a loop of its own."""
    started: Future[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = Future()
    fake = FakeQemu(path)

    async def run() -> None:
        done = asyncio.Event()
        server = await asyncio.start_unix_server(fake.serve, path)
        started.set_result((asyncio.get_running_loop(), done))
        await done.wait()
        server.close()

    with ThreadPoolExecutor(1) as thread:
        ended = thread.submit(asyncio.run, run())
        loop, done = started.result(DEADLINE_S)
        try:
            yield fake
        finally:
            loop.call_soon_threadsafe(done.set)
            ended.result(DEADLINE_S)
