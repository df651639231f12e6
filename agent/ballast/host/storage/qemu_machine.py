"""What a QEMU machine needs to live again, apart from its disks: its command line, and what its names stood for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ballast.host.machine import QmpFailed
from ballast.host.qmp import Qmp
from ballast.host.storage.qemu_disks import is_flash


async def describe_machine(qmp: Qmp) -> tuple[dict[str, Any], list[Path]]:
    """Tell of the machine, fit for JSON, and name the files of firmware variables. QmpFailed, OSError.

    The machine's type has its version there (``pc-q35-10.0-machine``) where the command line may say only ``q35``.
    """
    version = await qmp.run("query-version")
    blocks = await qmp.run("query-block")
    disks = [block for block in blocks if block.get("inserted") and "qdev" in block]
    flash = [block for block in disks if is_flash(block)]
    about = {
        "qemu": version["qemu"],
        "package": version["package"],
        "machine-type": await qmp.run("qom-get", path="/machine", property="type"),
        "cpu-type": await _cpu_type(qmp),
        "memory": await qmp.run("query-memory-size-summary"),
        "command-line": _command_line(qmp.pid),
        "working-directory": _folder(qmp.pid),
        "tpm": await qmp.run("query-tpm"),
        "disks": {block["qdev"]: block["inserted"]["image"] for block in disks},
    }
    return about, [_path(qmp.pid, block["inserted"]["file"]) for block in flash if not block["inserted"]["ro"]]


async def _cpu_type(qmp: Qmp) -> str:
    cpus = await qmp.run("query-cpus-fast")
    return str(await qmp.run("qom-get", path=cpus[0]["qom-path"], property="type"))


def _folder(pid: int) -> str:
    return str(Path("/proc", str(pid), "cwd").readlink())


def _command_line(pid: int) -> list[str]:
    words = Path("/proc", str(pid), "cmdline").read_bytes().split(b"\0")
    return [word.decode(errors="surrogateescape") for word in words[:-1]]


def _path(pid: int, name: str) -> Path:
    """A file as QEMU sees it. QmpFailed if it is none of this host's."""
    path = Path("/proc", str(pid), "cwd", name)
    if not path.is_file():
        raise QmpFailed(f"the firmware's variables are in {name}, which is no file of this host")
    return path
