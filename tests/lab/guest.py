"""A guest of the lab: QEMU with one of image.py's images, its disks, its ports and a shell in it.

Always under TCG: the /dev/kvm of a test machine may be there and boot nothing. Everything that a guest starts dies
with the thread that started it (PR_SET_PDEATHSIG), so start guests from a thread that lasts.
"""

import base64
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from tests.lab import qemu
from tests.lab.channel import Channel, Line
from tests.lab.image import Image

BOOT_TIMEOUT_S = 240
QMP_TIMEOUT_S = 60
# What an answer may take beyond the command's own time-out, in a guest without a free page.
ANSWER_GRACE_S = 30
CONSOLE_TAIL_LINES = 40
# How much of a failed command's output its exception carries, from the end.
SAID_CHARS = 4000
# "Block Name    PSize" and so on; a block without a name begins with its page size.
NAMELESS_RAM = re.compile(r"^ +\d+ [KMG]iB ", re.MULTILINE)


class BootFailed(Exception):
    """The guest did not come up; carries the end of its console."""


class CommandFailed(Exception):
    """A command in the guest exited with something else than 0; carries what it said."""


class QmpError(Exception):
    """QEMU refused a QMP command."""


@dataclass(frozen=True, slots=True)
class Result:
    """How a command in the guest ended."""

    returncode: int
    stdout: str
    stderr: str


class Guest:
    """A virtual machine: it starts on entering the context and is gone on leaving it. Then comes wait_boot().

    `disks` are (file system, bytes) each; wait_boot() mounts them as /mnt/data0, /mnt/data1 and so on.
    `token` arrives in the guest as the system credential ballast.token.
    `append` is for the kernel's command line, `machine` for QEMU's machine type q35, `arguments` for QEMU itself.
    All methods but close() may be called from several threads at once.

    Sockets on the host, for the programs under test:
    ballast_port and qga_port: the virtio-serial ports org.ballast.agent.0 and org.qemu.guest_agent.0;
    vsock_path: after the line `CONNECT 640` it is the guest's vsock port 640, from CID 2;
    qmp_path: a QMP monitor beside the one of qmp().
    """

    def __init__(
        self,
        image: Image,
        *,
        disks: Sequence[tuple[str, int]] = (),
        token: str | None = None,
        memory_bytes: int = 1 << 30,
        vsock: bool = True,
        append: str = "",
        machine: str = "",
        arguments: Sequence[str] = (),
    ) -> None:
        self.image = image
        self.dir = qemu.make_folder()
        self.console = self.dir / "console.log"
        self.ballast_port = self.dir / "ballast.sock"
        self.qga_port = self.dir / "qga.sock"
        self.vsock_path = self.dir / "vsock.sock"
        self.qmp_path = self.dir / "qmp.sock"
        self.disks: list[qemu.Disk] = []
        self._wanted_disks = disks
        self._token = token
        self._memory_bytes = memory_bytes
        self._vsock = vsock
        self._append = append
        self._machine = machine
        self._arguments = arguments
        self._processes: list[subprocess.Popen[bytes]] = []
        self._channels: list[Channel] = []
        self._buried = 0
        self._was_up = False

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Kill the guest's processes and remove its folder. May be called again."""
        while self._processes:
            process = self._processes.pop()
            process.kill()
            process.wait()
        for channel in self._channels:
            channel.close()
        shutil.rmtree(self.dir, ignore_errors=True)

    # Starting

    def _start(self) -> None:
        qemu.make_overlay(self.image, self.dir / "root.qcow2")
        self.disks = [qemu.make_disk(self.dir, i, *wanted) for i, wanted in enumerate(self._wanted_disks)]
        if self._vsock:
            self._processes.append(qemu.start_vsock(self.dir))
        qmp, qemus_qmp = socket.socketpair()
        shell, qemus_shell = socket.socketpair()
        self._channels = [Channel(qmp), Channel(shell)]
        self._qmp, self._shell = self._channels
        with qemus_qmp, qemus_shell:
            argv = qemu.command_line(
                self.image,
                self.dir,
                self.disks,
                memory_bytes=self._memory_bytes,
                append=self._append,
                machine=self._machine,
                token_file=self._write_token(),
                vsock=self._vsock,
                qmp=qemus_qmp,
                shell=qemus_shell,
            )
            argv += self._arguments
            inherited = (qemus_qmp.fileno(), qemus_shell.fileno())
            self._processes.append(qemu.start(argv, self.dir / "qemu.log", inherited))
        try:
            self._qmp.call({"execute": "qmp_capabilities"}, timeout_s=qemu.START_TIMEOUT_S)
        except (TimeoutError, ConnectionError) as error:
            raise BootFailed(f"QEMU does not start: {(self.dir / 'qemu.log').read_text()}") from error

    def _write_token(self) -> Path | None:
        """Put the credential into a file of ours: on the command line everybody could read it."""
        if self._token is None:
            return None
        path = self.dir / "token"
        path.touch(mode=0o600)
        path.write_text(f"io.systemd.credential:ballast.token={self._token}")
        return path

    def wait_boot(self, timeout_s: float = BOOT_TIMEOUT_S) -> None:
        """Wait until systemd says `running`, then mount the data disks; also after a reboot. Raises BootFailed."""
        try:
            self._wait_boot(timeout_s)
        except BootFailed:
            if self._was_up or not qemu.is_known_crash(self.dir):
                raise
            self.close()
            self.dir.mkdir(mode=0o700)
            self._start()
            self._wait_boot(timeout_s)
        self._was_up = True

    def _wait_boot(self, timeout_s: float) -> None:
        deadline_s = time.monotonic() + timeout_s
        try:
            state = self.run(["systemctl", "is-system-running", "--wait"], timeout_s=timeout_s, check=False)
            if state.stdout != "running\n":
                raise BootFailed(f"systemd says {state.stdout}{self.run('systemctl --failed --no-legend').stdout}")
            self.run(self._mount_script(), timeout_s=max(deadline_s - time.monotonic(), 1))
        except (TimeoutError, ConnectionError) as error:
            raise BootFailed(f"not up after {timeout_s:.0f} s; the console's end:\n{self.console_tail()}") from error

    def _mount_script(self) -> str:
        """Mount the data disks now, and by /etc/fstab at later boots; may run again."""
        lines = []
        for disk in self.disks:
            entry = f"/dev/disk/by-id/virtio-{disk.name} {disk.mountpoint} {disk.type} nofail"
            lines += [
                f"mkdir -p {disk.mountpoint}",
                f"grep -q {disk.mountpoint} /etc/fstab || echo {entry} >>/etc/fstab",
                f"mountpoint -q {disk.mountpoint} || mount {disk.mountpoint}",
            ]
        return "\n".join([*lines, "sync -f /etc"])

    def console_tail(self) -> str:
        """The last lines of the serial console, without what moves the cursor, and what QEMU itself said."""
        texts = [path.read_text(errors="replace") for path in (self.console, self.dir / "qemu.log") if path.exists()]
        plain = re.sub(r"\x1b\[[0-9;?!]*[A-Za-z]", "", "\n".join(texts))
        return "\n".join(plain.splitlines()[-CONSOLE_TAIL_LINES:])

    # Inside the guest

    def run(
        self, command: str | Sequence[str], *, timeout_s: float = 30, stdin: bytes = b"", check: bool = True
    ) -> Result:
        """Run a program, or a script by `bash -e`, as root; works while file systems are frozen.

        It is over when the program exits; what it left running loses its pipes, so redirect that.
        Raises TimeoutError, having killed it; CommandFailed if it exits with something else than 0 and `check`.
        """
        argv = ["/bin/bash", "-ec", command] if isinstance(command, str) else list(command)
        encoded = base64.b64encode(stdin).decode()
        reply = self._ask({"op": "run", "argv": argv, "stdin": encoded, "timeout_s": timeout_s}, timeout_s)
        stdout, stderr = (base64.b64decode(reply[name]).decode(errors="replace") for name in ("stdout", "stderr"))
        said = f"{command!r}:\n{stdout[-SAID_CHARS:]}{stderr[-SAID_CHARS:]}"
        if reply["returncode"] is None:
            raise TimeoutError(f"not over after {timeout_s} s: {said}")
        if check and reply["returncode"] != 0:
            raise CommandFailed(f"exit {reply['returncode']} of {said}")
        return Result(reply["returncode"], stdout, stderr)

    def put(self, path: str, data: bytes, mode: int = 0o644) -> None:
        """Write a file in the guest; its folder is made."""
        self._ask({"op": "put", "path": path, "mode": mode, "data": base64.b64encode(data).decode()})

    def get(self, path: str) -> bytes:
        """Read a file in the guest."""
        return base64.b64decode(self._ask({"op": "get", "path": path})["data"])

    def install(self, debs: Sequence[Path]) -> None:
        """Install Debian packages whose dependencies the image has."""
        paths = [f"/run/install/{deb.name}" for deb in debs]
        for deb, path in zip(debs, paths, strict=True):
            self.put(path, deb.read_bytes())
        self.run(["dpkg", "--install", *paths], timeout_s=180)
        self.run(["rm", *paths])

    def _ask(self, request: Line, timeout_s: float = 30) -> Line:
        reply = self._shell.call(request, timeout_s=timeout_s + ANSWER_GRACE_S)
        if "failed" in reply:
            raise CommandFailed(f"{request['op']}: {reply['failed']}")
        return reply

    # The machine

    def qmp(self, command: str, **arguments: Any) -> Any:
        """Run a QMP command and return its answer. `node_name=` is QMP's `node-name`; nested names are as they are.

        Raises QmpError.
        """
        dashed = {name.replace("_", "-"): value for name, value in arguments.items()}
        reply = self._qmp.call({"execute": command, "arguments": dashed}, timeout_s=QMP_TIMEOUT_S)
        if "error" in reply:
            raise QmpError(f"{command}: {reply['error']['desc']}")
        return reply["return"]

    def wait_qmp_event(self, name: str, timeout_s: float = QMP_TIMEOUT_S) -> Line:
        """Return the data of the next QMP event of that name, dropping the others before it. Raises TimeoutError."""
        deadline_s = time.monotonic() + timeout_s
        while True:
            event = self._qmp.next_event(timeout_s=deadline_s - time.monotonic())
            if event.get("event") == name:
                data: Line = event.get("data", {})
                return data

    def hot_add(self, bytes_: int, dimm_id: str) -> None:
        """Plug in a DIMM; its blocks are offline until somebody onlines them.

        With the vsock device there is room for 7 DIMMs: vhost-user's 8 memory slots are the limit, and raise QmpError.
        """
        # Shared like the rest: a vhost-user device must be able to map all of the guest's memory.
        backend = f"memory-{dimm_id}"
        self.qmp("object-add", qom_type="memory-backend-memfd", id=backend, size=bytes_, share=True)
        self.qmp("device_add", driver="pc-dimm", id=dimm_id, memdev=backend)

    def unplug(self, dimm_id: str, bytes_: int) -> None:
        """Take out a DIMM that hot_add() put in and whose blocks are offline."""
        self.qmp("device_del", id=dimm_id)
        while self.wait_qmp_event("DEVICE_DELETED").get("device") != dimm_id:
            pass
        self.qmp("object-del", id=f"memory-{dimm_id}")
        self.bury(bytes_)

    def bury(self, bytes_: int) -> None:
        """To be called after each memory backend of so many bytes that was deleted, by whomever.

        TCG (seen with QEMU 10.0.2) finds translated code by its place in QEMU's own RAM space, and keeps it when that
        RAM goes. The next backend gets the same place, and the guest runs the old DIMM's code out of the new DIMM's
        pages, whose contents are right: programs in it die of SIGSEGV. So the place is taken, by memory that nobody
        touches.
        """
        deadline_s = time.monotonic() + QMP_TIMEOUT_S
        # It is free a moment after object-del (RCU); until then it has a line without a name, as the buried ones have.
        while len(NAMELESS_RAM.findall(self.qmp("x-query-ramblock")["human-readable-text"])) > self._buried:
            if time.monotonic() > deadline_s:
                raise TimeoutError("QEMU does not free the memory of a DIMM that is gone")
            time.sleep(0.01)
        self._buried += 1
        self.qmp("object-add", qom_type="memory-backend-ram", id=f"buried-{self._buried}", size=bytes_)
