"""A guest of the lab that libvirt started: the same image, ports and shell as guest.py's, and qcow2 for all disks."""

from __future__ import annotations

import json
import socket
import subprocess
import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree
from xml.etree.ElementTree import SubElement

import libvirt
import libvirt_qemu

from tests.lab import qemu
from tests.lab.channel import Channel
from tests.lab.guest import Guest, QmpError

_GIVEN_UP_S = 20.0


class LibvirtGuest(Guest):
    """Defined at ``uri``, whose QEMUs must be root's; ``target`` is what [vm.NAME] libvirt says of it.

    Without vsock and QMP's events: the agent is at ``ballast_port``. ``images`` are its disks by target name.
    ``acks.sock`` is a port that others plug in when they need it.
    """

    def __init__(self, uri: str, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, vsock=False, **options)
        self._uri = uri
        self.target = f"{uri}/{self.dir.name}"
        self.images: dict[str, Path] = {}

    def close(self) -> None:
        """Destroy it, and have libvirt forget it."""
        connection = libvirt.open(self._uri)
        for domain in connection.listAllDomains():
            if domain.name() == self.dir.name:
                if domain.isActive():
                    domain.destroy()
                domain.undefineFlags(libvirt.VIR_DOMAIN_UNDEFINE_CHECKPOINTS_METADATA)
        connection.close()
        super().close()

    def qmp(self, command: str, **arguments: Any) -> Any:
        """Run a QMP command behind libvirt's back. QmpError."""
        domain = libvirt.open(self._uri).lookupByName(self.dir.name)
        asked = json.dumps({"execute": command, "arguments": arguments})
        reply = json.loads(libvirt_qemu.qemuMonitorCommand(domain, asked, 0))
        if "error" in reply:
            raise QmpError(f"{command}: {reply['error']['desc']}")
        return reply["return"]

    def _start(self) -> None:
        qemu.make_overlay(self.image, self.dir / "root.qcow2")
        self.disks = [qemu.make_disk(self.dir, i, *wanted) for i, wanted in enumerate(self._wanted_disks)]
        self.images = {"vda": self.dir / "root.qcow2"}
        for letter, disk in zip("bcdefgh", self.disks, strict=False):
            image = self.images[f"vd{letter}"] = disk.path.with_suffix(".qcow2")
            subprocess.run(["qemu-img", "convert", "-O", "qcow2", str(disk.path), str(image)], check=True)
            disk.path.unlink()
        libvirt.open(self._uri).defineXML(ElementTree.tostring(self._xml(), encoding="unicode")).create()
        self._shell = Channel(_connect(self.dir / "shell.sock"))
        self._channels = [self._shell]

    def _xml(self) -> ElementTree.Element:
        arguments = f"{qemu.KERNEL_ARGUMENTS} {self._append}".rstrip()
        features = "".join(
            f"<feature policy='disable' name='{word.removesuffix('=off')}'/>" for word in qemu.CPU.split(",")[1:]
        )
        domain = ElementTree.fromstring(
            f"<domain type='qemu'><name>{self.dir.name}</name><memory unit='b'>{self._memory_bytes}</memory>"
            "<memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking>"
            f"<vcpu>{qemu.CPUS}</vcpu><cpu mode='maximum'>{features}</cpu>"
            "<features><acpi/><apic/><smm state='off'/></features><clock offset='utc'>"
            "<timer name='hpet' present='no'/></clock><os><type arch='x86_64' machine='q35'>hvm</type>"
            f"<kernel>{self.image.kernel}</kernel><initrd>{self.image.initrd}</initrd><smbios mode='sysinfo'/></os>"
            "<devices><controller type='usb' model='none'/></devices></domain>"
        )
        SubElement(_find(domain, "os"), "cmdline").text = arguments
        devices = _find(domain, "devices")
        for (target, image), serial in zip(
            self.images.items(), ["root", *(disk.name for disk in self.disks)], strict=True
        ):
            disk = SubElement(devices, "disk", type="file", device="disk")
            SubElement(disk, "driver", name="qemu", type="qcow2", discard="unmap")
            SubElement(disk, "source", file=str(image))
            SubElement(disk, "target", dev=target, bus="virtio")
            SubElement(disk, "serial").text = serial
        ports = {"lab.shell.0": "shell", "org.ballast.agent.0": "ballast", "org.qemu.guest_agent.0": "qga"}
        for name, socket_name in (ports | {"lab.acks.0": "acks"}).items():
            channel = SubElement(devices, "channel", type="unix")
            SubElement(channel, "source", mode="bind", path=str(self.dir / f"{socket_name}.sock"))
            SubElement(channel, "target", type="virtio", name=name)
        serial_port = SubElement(devices, "serial", type="file")
        SubElement(serial_port, "source", path=str(self.console))
        strings = SubElement(SubElement(domain, "sysinfo", type="smbios"), "oemStrings")
        SubElement(strings, "entry").text = f"io.systemd.credential:ballast.token={self._token or ''}"
        return domain


def _find(xml: ElementTree.Element, name: str) -> ElementTree.Element:
    found = xml.find(name)
    if found is None:
        raise LookupError(name)
    return found


def _connect(path: Path) -> socket.socket:
    """Connect to a port that libvirt's QEMU has just opened."""
    connection = socket.socket(socket.AF_UNIX)
    deadline_s = time.monotonic() + _GIVEN_UP_S
    while True:
        try:
            connection.connect(str(path))
        except OSError:
            if time.monotonic() > deadline_s:
                raise
            time.sleep(0.02)
        else:
            return connection
