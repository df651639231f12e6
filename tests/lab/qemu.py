"""QEMU for the lab: the command line of a guest, and the processes behind it. guest.py is what tests use.

Every process is started by setpriv with a parent-death signal, so that none outlives the thread that started it,
however it ends. The fastest settings under TCG were found by measuring; the comments say what they are good for.
"""

import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.lab.image import Image, cache_dir

DIR_PREFIX = "ballast-guest-"
START_TIMEOUT_S = 20
GUEST_CID = 42
# The string instructions' flags make the kernel clear and copy by single bytes, which TCG does 7 times as slowly.
CPU = "max,erms=off,fsrm=off,fsrs=off,fzrm=off,la57=off"
CPUS = 2
SLOTS = 16
MEMORY_MAX_BYTES = 8 << 30
# memhp_default_state: Debian 12's kernel leaves hot-added memory offline, Debian 13's would not.
KERNEL_ARGUMENTS = "root=/dev/vda rw fsck.mode=skip console=ttyS0 quiet mitigations=off memhp_default_state=offline"


@dataclass(frozen=True, slots=True)
class Disk:
    """A data disk: `name` is QEMU's node name and the disk's serial in the guest, `path` the raw image on the host."""

    name: str
    type: str
    path: Path
    mountpoint: str


def make_folder() -> Path:
    """Make a guest's folder, and remove those of test processes that were killed."""
    for folder in Path(tempfile.gettempdir()).glob(f"{DIR_PREFIX}*-*"):
        if not Path("/proc", folder.name.removeprefix(DIR_PREFIX).split("-")[0]).exists():
            shutil.rmtree(folder, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f"{DIR_PREFIX}{os.getpid()}-"))


def is_known_crash(folder: Path) -> bool:
    """Whether QEMU ended by a race of TCG's own, in one of several hundred boots of two CPUs (QEMU issue 1921)."""
    return "iotlb_to_section: Assertion" in (folder / "qemu.log").read_text(errors="replace")


def make_disk(folder: Path, index: int, fs_type: str, bytes_: int) -> Disk:
    """Make a sparse image with a file system on it, by mkfs.<fs_type>."""
    disk = Disk(f"data{index}", fs_type, folder / f"data{index}.raw", f"/mnt/data{index}")
    with disk.path.open("wb") as file:
        file.truncate(bytes_)
    # Initialised whole, so that ext4 does not write in the background while a test counts writes.
    options = ["-E", "lazy_itable_init=0,lazy_journal_init=0"] if fs_type == "ext4" else []
    subprocess.run([f"mkfs.{fs_type}", "-q", *options, str(disk.path)], check=True, capture_output=True)
    return disk


def make_overlay(image: Image, path: Path) -> None:
    """Make the qcow2 that takes a guest's writes to its root."""
    backing = ["-b", str(image.root), "-F", "raw"]
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *backing, str(path)], check=True, capture_output=True)


def start(argv: Sequence[str], log: Path, pass_fds: Sequence[int] = ()) -> subprocess.Popen[bytes]:
    """Start a program that dies with the calling thread; what it says goes to `log`."""
    with log.open("wb") as output:
        return subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "--", *argv],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            pass_fds=pass_fds,
        )


def start_vsock(folder: Path) -> subprocess.Popen[bytes]:
    """Start vhost-device-vsock, and wait until it listens for QEMU at vhost.sock; `vsock.sock` is the host's door."""
    vhost = folder / "vhost.sock"
    program = cache_dir() / "bin/vhost-device-vsock"
    where = ["--socket", str(vhost), "--uds-path", str(folder / "vsock.sock")]
    process = start([str(program), "--guest-cid", str(GUEST_CID), *where], folder / "vhost.log")
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while not _is_listening(vhost):
        if process.poll() is not None or time.monotonic() > deadline_s:
            process.kill()
            process.wait()
            raise RuntimeError(f"vhost-device-vsock does not listen: {(folder / 'vhost.log').read_text()}")
        time.sleep(0.005)
    return process


def _is_listening(path: Path) -> bool:
    # "Num RefCount Protocol Flags Type St Inode Path"; __SO_ACCEPTCON is 0x10000. A probing connect would be taken
    # for QEMU's, and there is only one.
    sockets = (line.split() for line in Path("/proc/net/unix").read_text().splitlines())
    return any(fields[-1] == str(path) and fields[3] == "00010000" for fields in sockets)


def command_line(
    image: Image,
    folder: Path,
    disks: Sequence[Disk],
    *,
    memory_bytes: int,
    append: str,
    machine: str,
    token_file: Path | None,
    vsock: bool,
    qmp: socket.socket,
    shell: socket.socket,
) -> list[str]:
    """QEMU's arguments. `qmp` and `shell` are our ends' peers, inherited; the other sockets are made in `folder`."""
    return [
        *("qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none"),
        *("-machine", f"q35,memory-backend=ram,smm=off,hpet=off,{machine}".rstrip(",")),
        *("-accel", "tcg,thread=multi"),
        *("-cpu", CPU, "-smp", str(CPUS)),
        *("-m", f"size={memory_bytes}B,slots={SLOTS},maxmem={MEMORY_MAX_BYTES}B"),
        *("-object", f"memory-backend-memfd,id=ram,size={memory_bytes}B,share=on"),
        *("-kernel", str(image.kernel), "-initrd", str(image.initrd)),
        *("-append", f"{KERNEL_ARGUMENTS} {append}".rstrip()),
        *("-serial", f"file:{folder / 'console.log'}"),
        *("-chardev", f"socket,id=qmp,fd={qmp.fileno()}", "-mon", "chardev=qmp,mode=control"),
        *("-chardev", f"socket,id=qmp-path,path={folder / 'qmp.sock'},server=on,wait=off"),
        *("-mon", "chardev=qmp-path,mode=control"),
        *_root_arguments(folder / "root.qcow2"),
        *(argument for disk in disks for argument in _disk_arguments(disk)),
        *("-device", "virtio-serial-pci,id=serial"),
        *_port_arguments("shell", "lab.shell.0", f"fd={shell.fileno()}"),
        *_port_arguments("ballast", "org.ballast.agent.0", f"path={folder / 'ballast.sock'},server=on,wait=off"),
        *_port_arguments("qga", "org.qemu.guest_agent.0", f"path={folder / 'qga.sock'},server=on,wait=off"),
        *(_vsock_arguments(folder / "vhost.sock") if vsock else ()),
        *(("-smbios", f"type=11,path={token_file}") if token_file else ()),
    ]


def _root_arguments(overlay: Path) -> list[str]:
    blockdev = f"driver=qcow2,node-name=root,file.driver=file,file.filename={overlay}"
    return ["-blockdev", blockdev, "-device", "virtio-blk-pci,id=disk-root,drive=root,serial=root"]


def _disk_arguments(disk: Disk) -> list[str]:
    blockdev = f"driver=raw,node-name={disk.name},discard=unmap,file.driver=file,file.filename={disk.path}"
    device = f"virtio-blk-pci,id=disk-{disk.name},drive={disk.name},serial={disk.name}"
    return ["-blockdev", blockdev, "-device", device]


def _port_arguments(chardev_id: str, name: str, socket_options: str) -> list[str]:
    device = f"virtserialport,id=port-{chardev_id},chardev={chardev_id},name={name}"
    return ["-chardev", f"socket,id={chardev_id},{socket_options}", "-device", device]


def _vsock_arguments(vhost: Path) -> list[str]:
    return ["-chardev", f"socket,id=vhost,path={vhost}", "-device", "vhost-user-vsock-pci,id=vsock,chardev=vhost"]
