"""A libvirt of the tests' own, and machines of it that never run their guest: tests play the guest's writes.

libvirtd has mounts and processes to itself: it finds nothing of this host's, and whatever it started ends with it.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import libvirt
import libvirt_qemu

from tests.lab import qemu
from tests.lab.still_machine import Played

# Of a host where libvirtd is not: its folders, each hidden behind one of ours.
_FOLDERS = {"etc": "/etc/libvirt", "run": "/run/libvirt", "lib": "/var/lib/libvirt", "log": "/var/log/libvirt"}
_END_S = 30.0


@dataclass
class LibvirtMachine(Played):
    """A defined machine; ``target`` is what [vm.NAME] libvirt says of it, ``images`` are its disks by target name."""

    target: str
    domain: Any
    images: dict[str, Path]
    held: dict[str, bytearray]
    qdevs: dict[str, str]
    _log: Path
    _dice: random.Random = field(default_factory=lambda: random.Random(0))

    def start(self) -> None:
        """Start it, and not its guest."""
        self.domain.createWithFlags(libvirt.VIR_DOMAIN_START_PAUSED)

    def quit(self) -> None:
        """End as after a guest's shutdown: images are closed, and qcow2 keeps its bitmaps."""
        self.domain.destroyFlags(libvirt.VIR_DOMAIN_DESTROY_GRACEFUL)

    def remove(self) -> None:
        """Have libvirt forget it."""
        if self.domain.isActive():
            self.domain.destroy()
        self.domain.undefineFlags(libvirt.VIR_DOMAIN_UNDEFINE_CHECKPOINTS_METADATA)

    def crash(self) -> None:
        """Kill its QEMU, and wait until libvirt knows."""
        name = f"guest={self.domain.name()},".encode()
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            if name in path.read_bytes():
                os.kill(int(path.parent.name), signal.SIGKILL)
        deadline_s = time.monotonic() + _END_S
        while self.domain.isActive():
            if time.monotonic() > deadline_s:
                raise RuntimeError("libvirt has not seen that QEMU was killed")
            time.sleep(0.02)

    def ask(self, command: str) -> str:
        """Run a QMP command, as JSON, behind libvirt's back."""
        return str(libvirt_qemu.qemuMonitorCommand(self.domain, command, 0))

    def checkpoints(self) -> list[str]:
        """Names of all checkpoints."""
        return sorted(one.getName() for one in self.domain.listAllCheckpoints())

    def has_job(self) -> bool:
        """Whether a backup runs."""
        return bool(self.domain.jobInfo()[0] != libvirt.VIR_DOMAIN_JOB_NONE)

    def _hmp(self, line: str) -> str:
        flag = libvirt_qemu.VIR_DOMAIN_QEMU_MONITOR_COMMAND_HMP
        return str(libvirt_qemu.qemuMonitorCommand(self.domain, line, flag))


@contextmanager
def libvirt_daemon(folder: Path, user: str | None = None) -> Iterator[str]:
    """Start a libvirtd, whose QEMUs run as ``user``, else as the one of the distribution's choice; its URI.

    All of it is killed at the end. What is mounted later is not seen there.
    """
    libvirt.registerErrorHandler(lambda _context, _error: None, None)
    for name in _FOLDERS:
        (folder / name).mkdir(parents=True)
    (folder / "etc/qemu.conf").write_text(
        'security_driver = "none"\nstdio_handler = "file"\nremember_owner = 0\n'
        "cgroup_controllers = []\nnamespaces = []\n" + (f'user = "{user}"\ngroup = "{user}"\n' if user else "")
    )
    socket = folder / "run/libvirt-sock"
    (folder / "etc/libvirtd.conf").write_text('unix_sock_dir = "/run/libvirt"\nauth_unix_rw = "none"\n')
    mounts = "".join(f"mkdir -p {theirs}; mount --bind {folder / ours} {theirs}; " for ours, theirs in _FOLDERS.items())
    # The shell is the first process there: it waits for QEMUs that libvirtd left to it.
    script = f"set -e; {mounts} libvirtd -f /etc/libvirt/libvirtd.conf & wait"
    words = ["unshare", "--mount", "--pid", "--fork", "--kill-child=KILL", "--mount-proc"]
    process = qemu.start([*words, "sh", "-c", script], folder / "libvirtd.log")
    try:
        uri = f"qemu+unix:///system?socket={socket}"
        _wait_for(uri, process, folder / "libvirtd.log")
        yield uri
    finally:
        process.kill()
        process.wait()


def _wait_for(uri: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline_s = time.monotonic() + _END_S
    while True:
        try:
            libvirt.open(uri).close()
        except libvirt.libvirtError as error:
            if process.poll() is not None or time.monotonic() > deadline_s:
                raise RuntimeError(f"libvirtd does not answer: {error}\n{log.read_text()}") from error
            time.sleep(0.02)
        else:
            return


def define(uri: str, folder: Path, images: dict[str, Path], sizes: dict[str, int]) -> LibvirtMachine:
    """Define a machine with these disks by target name (``vda``); those in ``.raw`` are raw, others qcow2."""
    name = f"ballast-lab-{uuid.uuid4()}"
    domain = ElementTree.fromstring(
        f"<domain type='qemu'><name>{name}</name><memory unit='MiB'>16</memory>"
        "<os><type arch='x86_64' machine='q35'>hvm</type></os>"
        "<devices><controller type='usb' model='none'/><memballoon model='none'/></devices></domain>"
    )
    devices = domain.find("devices")
    if devices is None:
        raise AssertionError("it is in the text above")
    for target, image in images.items():
        disk = ElementTree.SubElement(devices, "disk", type="file", device="disk")
        format_ = "raw" if image.suffix == ".raw" else "qcow2"
        ElementTree.SubElement(disk, "driver", name="qemu", type=format_)
        ElementTree.SubElement(disk, "source", file=str(image))
        ElementTree.SubElement(disk, "target", dev=target, bus="virtio")
        ElementTree.SubElement(disk, "alias", name=f"ua-{target}")
    defined = libvirt.open(uri).defineXML(ElementTree.tostring(domain, encoding="unicode"))
    held = {target: bytearray(sizes[target]) for target in images}
    qdevs = {target: f"/machine/peripheral/ua-{target}/virtio-backend" for target in images}
    log = folder / "log/qemu" / f"{name}.log"
    return LibvirtMachine(f"{uri}/{name}", defined, images, held, qdevs, log)
