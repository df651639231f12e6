"""A backup booted on trial: a throw-away machine runs from overlays on its disks, without a network, and is judged.

It is well when the guest's own agent answers: the kernel has found its root, and systemd has started services.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ballast.host.agent import Agent
from ballast.host.storage import images
from ballast.host.storage.catalog import Backup
from ballast.host.storage.shape import Shape, read_shape
from ballast.wire.errors import AgentError

BOOT_S = 600.0
_ASK_S = 5.0
_LOOK_S = 1.0
_SAID_LINES = 5
_DEVICES = {"scsi": "scsi-hd", "ide": "ide-hd", "nvme": "nvme", "virtio": "virtio-blk-pci"}


@dataclass(frozen=True, slots=True)
class Trial:
    """How it went: ``wrong`` is None if the agent answered; ``boot_s`` is how long that took."""

    boot_s: float
    agent: str | None
    wrong: str | None


async def boot(place: Path, chain: Sequence[Backup], key_file: Path | None, *, patience_s: float = BOOT_S) -> Trial:
    """Boot the last backup of a chain in ``place``; nothing of it is changed. BackupFailed if it cannot be tried.

    What the guest writes meanwhile goes to files in $TMPDIR (/var/tmp), which are gone at the end.
    """
    backup, machine = chain[-1], place / chain[-1].id / "machine"
    shape = await asyncio.to_thread(read_shape, machine)
    async with contextlib.AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ballast-trial-")))
        sockets = {}
        for image in backup.images:
            path, key = place / backup.id / image.file, key_file if image.encrypted else None
            sockets[image.disk] = await stack.enter_async_context(images.show(path, depth=len(chain), key_file=key))
        firmware = await _firmware(shape, machine, folder)
        process = await images.start("qemu-system-x86_64", *_machine(shape, folder), *firmware, *_disks(shape, sockets))
        try:
            return await _judge(process, folder, patience_s)
        finally:
            await images.kill(process)


def _machine(shape: Shape, folder: Path) -> list[str]:
    how = ["-accel", "kvm", "-cpu", "host"] if shape.is_accelerated else ["-accel", "tcg", "-cpu", "max,la57=off"]
    port = "virtserialport,chardev=agent,name=org.ballast.agent.0"
    words = ["-machine", shape.machine_type, *how, "-m", f"size={shape.memory_bytes}B", "-smp", "2"]
    words += ["-nodefaults", "-no-user-config", "-nic", "none", "-display", "none", "-no-reboot"]
    words += ["-serial", f"file:{folder}/console", "-device", "virtio-rng-pci", "-device", "virtio-scsi-pci,id=scsi"]
    words += ["-chardev", f"socket,id=agent,path={folder}/agent,server=on,wait=off"]
    words += ["-device", "virtio-serial-pci", "-device", port]
    for option, value in (("-kernel", shape.kernel), ("-initrd", shape.initrd), ("-append", shape.append)):
        words += [option, value] if value else []
    return words


async def _firmware(shape: Shape, machine: Path, folder: Path) -> list[str]:
    """UEFI's code, and a copy of its variables."""
    variables = next((machine / name for name in ("nvram", "firmware-0") if (machine / name).exists()), None)
    if shape.firmware is None:
        return []
    if variables is None:
        return ["-bios", shape.firmware]
    copy = Path(await asyncio.to_thread(shutil.copyfile, variables, folder / "variables"))
    words = []
    for path, is_read_only in ((Path(shape.firmware), "on"), (copy, "off")):
        format_ = (await images.read_info(path)).format
        words += ["-drive", f"if=pflash,format={format_},readonly={is_read_only},file={images.escape(str(path))}"]
    return words


def _disks(shape: Shape, sockets: dict[str, Path]) -> list[str]:
    words = []
    for number, disk in enumerate(shape.disks):
        serial = f",serial={images.escape(disk.serial)}" if disk.serial else ""
        words += ["-drive", f"id=disk{number},if=none,snapshot=on,format=raw,file=nbd:unix:{sockets[disk.name]}"]
        words += ["-device", f"{_DEVICES[disk.bus]},drive=disk{number}{serial}"]
    return words


async def _judge(process: asyncio.subprocess.Process, folder: Path, patience_s: float) -> Trial:
    clock = asyncio.get_running_loop().time
    began_s = clock()
    while (passed_s := clock() - began_s) < patience_s:
        if process.returncode is not None:
            _, said = await process.communicate()
            return Trial(passed_s, None, f"its machine ended: {said.decode(errors='replace').strip()}{_last(folder)}")
        with contextlib.suppress(AgentError, OSError, TimeoutError):
            async with asyncio.timeout(_ASK_S), Agent.connect(f"unix:{folder}/agent") as agent:
                version = (await agent.status()).version
                return Trial(clock() - began_s, version, None)
        await asyncio.sleep(_LOOK_S)
    return Trial(passed_s, None, f"its agent did not answer within {patience_s:.0f} s{_last(folder)}")


def _last(folder: Path) -> str:
    """What the guest said last on its serial console, if anything."""
    console = folder / "console"
    lines = console.read_text(errors="replace").split("\n")[-_SAID_LINES:] if console.exists() else []
    said = " | ".join(line.strip() for line in lines if line.strip())
    return f"; its console said last: {said}" if said else ""
