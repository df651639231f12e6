"""Disks for tests of the copier: files with a known pattern, and NBD servers that tests may stop, kill or starve."""

from __future__ import annotations

import random
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MIB = 1 << 20
TIMEOUT_S = 30.0


def run(*argv: str | Path) -> str:
    """Run a program of QEMU's to its end, and return what it said."""
    return subprocess.run(argv, check=True, capture_output=True, text=True, timeout=TIMEOUT_S).stdout


def patchwork(bytes_: int, seed: int = 0) -> bytes:
    """Pieces of data and of nothing, of many lengths."""
    dice = random.Random(seed)
    content = bytearray()
    while len(content) < bytes_:
        length = dice.randrange(1, 1 << dice.randrange(9, 20))
        content += dice.randbytes(length) if dice.random() < 0.5 else bytes(length)
    return bytes(content[:bytes_])


def write_sparse(path: Path, content: bytes, piece_bytes: int = 4096) -> Path:
    """Make a raw disk in which what is zero is a hole."""
    with path.open("wb") as file:
        for offset in range(0, len(content), piece_bytes):
            piece = content[offset : offset + piece_bytes]
            if any(piece):
                file.seek(offset)
                file.write(piece)
        file.truncate(len(content))
    return path


def read_all(path: Path, folder: Path) -> bytes:
    """What a guest would see on a qcow2."""
    raw = folder / "seen.raw"
    run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", path, raw)
    return raw.read_bytes()


@contextmanager
def nbd_server(socket: Path, *words: str | Path, limit_bytes: int | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """A qemu-nbd for one client; with a limit its files end there, as if the disk were full."""
    ready = socket.with_suffix(".pid")
    # Without its signal, a write beyond the limit is an error that NBD tells as ENOSPC.
    shell = f'trap "" XFSZ; {f"ulimit -f {limit_bytes // 1024};" if limit_bytes else ""} exec "$@"'
    argv = ["setpriv", "--pdeathsig", "KILL", "qemu-nbd", "-k", socket, "--pid-file", ready, *words]
    process = subprocess.Popen(["bash", "-c", shell, "sh", *argv])
    try:
        deadline_s = time.monotonic() + TIMEOUT_S
        while not ready.exists():
            assert process.poll() is None, "qemu-nbd did not start"
            assert time.monotonic() < deadline_s, "qemu-nbd did not start in time"
            time.sleep(0.01)
        yield process
    finally:
        process.kill()
        process.wait(TIMEOUT_S)
