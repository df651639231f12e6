"""A QEMU that never runs its guest: tests play the guest's writes, and know at any time what its disks hold."""

from __future__ import annotations

import random
import socket
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.lab import qemu
from tests.lab.channel import Channel

TIMEOUT_S = 60.0


class Played:
    """Disks to which a test writes as a guest would; ``held`` is what each, by its name, holds."""

    held: dict[str, bytearray]
    qdevs: dict[str, str]
    _log: Path
    _dice: random.Random

    def write(self, disk: str, offset: int, bytes_: int, value: int | None = None) -> None:
        """Write as the guest would: through the device's own end of the chain of nodes."""
        value = self._dice.randrange(1, 256) if value is None else value
        before = self._log.stat().st_size
        said = self._hmp(f'qemu-io -d {self.qdevs[disk]} "write -P {value} {offset} {bytes_}"')
        said += self._log.read_text()[before:]  # what qemu-io prints, QEMU prints
        if f"wrote {bytes_}/{bytes_}" not in said:
            raise RuntimeError(f"the guest's write failed: {said}")
        self.held[disk][offset : offset + bytes_] = bytes([value]) * bytes_

    def scribble(self, times: int) -> None:
        """Write here and there on all disks: aligned to sectors only, of any length."""
        for _ in range(times):
            disk = self._dice.choice(sorted(self.held))
            sectors = len(self.held[disk]) // 512
            first = self._dice.randrange(sectors)
            self.write(disk, first * 512, min(self._dice.randrange(1, 600), sectors - first) * 512)

    def snapshot(self) -> dict[str, bytes]:
        """What all disks hold now."""
        return {disk: bytes(content) for disk, content in self.held.items()}

    def _hmp(self, line: str) -> str:
        raise NotImplementedError


@dataclass
class StillMachine(Played):
    """``qmp`` is for who is tested."""

    qmp: Path
    process: subprocess.Popen[bytes]
    held: dict[str, bytearray]
    qdevs: dict[str, str]
    _channel: Channel
    _log: Path
    _dice: random.Random = field(default_factory=lambda: random.Random(0))

    def ask(self, command: str, **arguments: Any) -> Any:
        """Run a QMP command on a connection that who is tested does not use. RuntimeError."""
        answer = self._channel.call({"execute": command, "arguments": arguments}, timeout_s=TIMEOUT_S)
        if "error" in answer:
            raise RuntimeError(f"{command}: {answer['error']['desc']}")
        return answer["return"]

    def nodes_of_ours(self) -> list[str]:
        """Names of all block nodes that a backup made."""
        nodes = self.ask("query-named-block-nodes", flat=True)
        return [node["node-name"] for node in nodes if node["node-name"].startswith("ballast-")]

    def bitmaps(self) -> dict[str, list[str]]:
        """Names of the bitmaps on each node that has some."""
        return {
            node["node-name"]: names
            for node in self.ask("query-named-block-nodes", flat=True)
            if (names := sorted(one["name"] for one in node.get("dirty-bitmaps", ()) if "name" in one))
        }

    def quit(self) -> None:
        """End as after a guest's shutdown: images are closed, and qcow2 keeps its bitmaps."""
        self.ask("quit")
        self.process.wait(TIMEOUT_S)

    def _hmp(self, line: str) -> str:
        return str(self.ask("human-monitor-command", **{"command-line": line}))


@contextmanager
def still_machine(
    folder: Path, disks: dict[str, Path], held: dict[str, bytearray], arguments: Sequence[str] = ()
) -> Iterator[StillMachine]:
    """Start a QEMU on these images, killed at the end; disks in ``.raw`` are raw, others qcow2."""
    folder.mkdir(exist_ok=True)
    (qmp := folder / "qmp").unlink(missing_ok=True)
    argv = ["qemu-system-x86_64", "-machine", "q35,accel=tcg", "-m", "16", "-display", "none", "-nodefaults", "-S"]
    argv += ["-chardev", f"socket,id=qmp,path={qmp},server=on,wait=off", "-mon", "chardev=qmp,mode=control"]
    argv += ["-object", "iothread,id=io", *arguments]
    for number, (name, image) in enumerate(disks.items()):
        driver = "raw" if image.suffix == ".raw" else "qcow2"
        file = f"file.driver=file,file.filename={image}"
        argv += ["-blockdev", f"driver={driver},node-name=node{number},{file},discard=unmap"]
        argv += ["-device", f"virtio-blk-pci,drive=node{number},id={name}" + (",iothread=io" if number % 2 else "")]
    ours, qemus = socket.socketpair()
    with qemus:
        argv += ["-chardev", f"socket,id=lab,fd={qemus.fileno()}", "-mon", "chardev=lab,mode=control"]
        process = qemu.start(argv, folder / "qemu.log", [qemus.fileno()])
    channel = Channel(ours)
    try:
        channel.call({"execute": "qmp_capabilities"}, timeout_s=qemu.START_TIMEOUT_S)
        qdevs = {name: f"/machine/peripheral/{name}/virtio-backend" for name in disks}
        yield StillMachine(qmp, process, held, qdevs, channel, folder / "qemu.log")
    finally:
        process.kill()
        process.wait()
        channel.close()
