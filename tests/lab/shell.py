"""The lab's shell: it runs inside the guest and does what the test on the host asks, over virtio-serial.

It runs as `/usr/bin/python3 -IB /usr/lib/lab/shell.py`, from the unit in image.py, and is no part of the product.

The wire: one JSON object a line, on the port lab.shell.0; bytes travel as base64.

    {"id": 1, "op": "run", "argv": ["uname", "-r"], "stdin": "", "timeout_s": 30}
        -> {"id": 1, "returncode": 0, "stdout": "...", "stderr": "..."}; returncode is null after a time-out
    {"id": 2, "op": "put", "path": "/run/x", "mode": 420, "data": "..."}     -> {"id": 2}
    {"id": 3, "op": "get", "path": "/run/x"}                                 -> {"id": 3, "data": "..."}
    anything that fails                                                      -> {"id": 3, "failed": "..."}

It has to work while the guest's root file system is frozen: it imports everything at the start, writes nothing
to any disk and logs nothing. A process that sleeps uninterruptibly on a frozen disk outlives SIGKILL, so a
time-out is answered without waiting for it, and each request has a thread of its own.
"""

import base64
import json
import os
import select
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

PORT = "/dev/virtio-ports/lab.shell.0"
BACK_OFF_S = 0.1
READ_BYTES = 65536


def drain(pipe: int, into: bytearray) -> bool:
    """Read what is there; false at the end of the pipe."""
    try:
        data = os.read(pipe, READ_BYTES)
    except BlockingIOError:
        return True
    into += data
    return bool(data)


def feed(pipe: int, data: memoryview) -> memoryview:
    """Write what fits and return the rest; a reader that has gone takes it all."""
    try:
        return data[os.write(pipe, data) :]
    except BlockingIOError:
        return data
    except BrokenPipeError:
        return data[:0]


def converse(child: "subprocess.Popen[bytes]", stdin: bytes, deadline_s: float) -> dict[int, bytearray]:
    """Feed and read the child until it has exited, or until the deadline (CLOCK_MONOTONIC).

    Processes that the child leaves behind may hold its pipes open: it is the child's exit that ends this, and
    what was written until then is still read.
    """
    if not (child.stdin and child.stdout and child.stderr):
        raise ValueError("a child without pipes")
    outputs = {pipe.fileno(): bytearray() for pipe in (child.stdout, child.stderr)}
    rest = memoryview(stdin)
    exited = os.pidfd_open(child.pid)
    poll = select.poll()
    poll.register(exited, select.POLLIN)
    for pipe in (child.stdin.fileno(), *outputs):
        os.set_blocking(pipe, False)
        poll.register(pipe, select.POLLOUT if pipe == child.stdin.fileno() else select.POLLIN)
    try:
        ready: list[int] = []
        while exited not in ready and (left_s := deadline_s - time.monotonic()) > 0:
            ready = [fd for fd, _ in poll.poll(left_s * 1000)]
            for fd in ready:
                if fd in outputs and not drain(fd, outputs[fd]):
                    poll.unregister(fd)
                elif not child.stdin.closed and fd == child.stdin.fileno():
                    rest = feed(fd, rest)
                    if not rest:
                        poll.unregister(fd)
                        child.stdin.close()
        for fd, output in outputs.items():
            drain(fd, output)  # one read takes all that a pipe can hold
    finally:
        os.close(exited)
    return outputs


def run(argv: list[str], stdin: str, timeout_s: float) -> dict[str, Any]:
    """Run a program in a session of its own, and kill that session at the time-out."""
    deadline_s = time.monotonic() + timeout_s
    # choom: our own place outside the OOM killer's reach is not for the programs we run.
    child = subprocess.Popen(
        ["/usr/bin/choom", "-n", "0", "--", *argv],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    stdout, stderr = converse(child, base64.b64decode(stdin), deadline_s).values()
    returncode = child.poll()
    if returncode is None:
        os.killpg(child.pid, 9)
        threading.Thread(target=child.wait, daemon=True).start()
    for pipe in (child.stdin, child.stdout, child.stderr):
        if pipe:
            pipe.close()
    return {
        "returncode": returncode,
        "stdout": base64.b64encode(stdout).decode(),
        "stderr": base64.b64encode(stderr).decode(),
    }


def put(path: str, mode: int, data: str) -> dict[str, Any]:
    """Write a file, whole or not at all; its folder is made."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    part = Path(path + ".part")
    part.write_bytes(base64.b64decode(data))
    part.chmod(mode)
    part.rename(path)
    return {}


def get(path: str) -> dict[str, Any]:
    """Read a file."""
    return {"data": base64.b64encode(Path(path).read_bytes()).decode()}


OPERATIONS: dict[str, Callable[..., dict[str, Any]]] = {"run": run, "put": put, "get": get}


class Port:
    """The virtio-serial port: lines in, answers of several threads out."""

    def __init__(self) -> None:
        self._fd = os.open(PORT, os.O_RDWR)
        self._writing = threading.Lock()

    def lines(self) -> Iterator[bytes]:
        """Yield whole lines for ever. Without a reader on the host the port is always at its end: back off."""
        pending = b""
        while True:
            data = os.read(self._fd, READ_BYTES)
            if not data:
                pending = b""
                time.sleep(BACK_OFF_S)
            *whole, pending = (pending + data).split(b"\n")
            yield from whole

    def answer(self, request: dict[str, Any]) -> None:
        """Do what one request asks and send the answer. Runs in a thread of its own."""
        arguments = {name: value for name, value in request.items() if name not in ("id", "op")}
        try:
            reply = OPERATIONS[request["op"]](**arguments)
        except Exception as error:  # noqa: BLE001  # whatever it is, the host has to hear of it
            reply = {"failed": f"{type(error).__name__}: {error}"}
        line = memoryview(json.dumps({"id": request["id"], **reply}).encode() + b"\n")
        with self._writing:
            while line:
                line = line[os.write(self._fd, line) :]


def main() -> None:
    """Serve for ever."""
    port = Port()
    for line in port.lines():
        threading.Thread(target=port.answer, args=[json.loads(line)], daemon=True).start()


if __name__ == "__main__":
    main()
