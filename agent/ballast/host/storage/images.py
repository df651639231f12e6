"""qcow2 images of backups, through qemu-img and qemu-nbd of QEMU 10 alone.

Each program dies with us, and has a deadline: how long it may take, or how long it may make no progress.
Passphrases go by the name of their file, never on a command line.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import tempfile
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ballast.host.storage.source import BackupFailed

Format = Literal["qcow2", "raw"]

QUICK_S = 60.0
_START_S = 20.0
_END_S = 120.0
_KILL_S = 1.0
_KEY = "key"
_SAID_CHARS = 500


@dataclass(frozen=True, slots=True)
class ImageInfo:
    """What an image says of itself. ``backing`` is as it is written there."""

    format: str
    bytes: int
    used_bytes: int
    backing: str | None
    is_encrypted: bool


async def create(path: Path, bytes_: int, *, backing: str | None = None, key_file: Path | None = None) -> None:
    """Make a qcow2 of a size; ``backing`` is a qcow2 that is looked for from ``path``. BackupFailed."""
    options = []
    if key_file:
        options += ["encrypt.format=luks", f"encrypt.key-secret={_KEY}"]
    if backing:
        options += [f"backing_file={escape(backing)}", "backing_fmt=qcow2"]
    words = ["create", "-q", "-f", "qcow2", "-u", *_secret(key_file)]
    words += ["-o", ",".join(options)] if options else []
    await _qemu_img(*words, _place(path), str(bytes_))


async def read_info(path: Path) -> ImageInfo:
    """What an image is, without opening those it is based on. BackupFailed."""
    said = json.loads(await _qemu_img("info", "--output=json", "-U", _place(path)))
    return ImageInfo(
        said["format"],
        said["virtual-size"],
        said["actual-size"],
        said.get("backing-filename"),
        said.get("encrypted", False),
    )


async def check(path: Path, *, depth: int = 1, key_file: Path | None = None) -> str | None:
    """What is wrong with an image's own structure, None if nothing; ``depth`` is the length of its chain."""
    words = ["check", "--output=json", *_secret(key_file), "--image-opts", _open(path, depth, key_file)]
    process = await start("qemu-img", *words)
    said = await _finish(process, None)
    if process.returncode == 0:
        return None
    with contextlib.suppress(ValueError):
        found: dict[str, Any] = json.loads(said[0])
        counts = (f"{found[kind]} {kind}" for kind in ("corruptions", "leaks", "check-errors") if found.get(kind))
        return ", ".join(counts)
    return said[1] or f"qemu-img check ended with {process.returncode}"


async def convert(
    path: Path, to: Path, *, format_: Format, depth: int, key_file: Path | None = None, advance: Callable[[float], None]
) -> None:
    """Make a disk of an image and all that it is based on; ``advance`` is told shares of it (0 to 1). BackupFailed.

    Takes as long as it takes. ``to`` must not exist; its blocks are on the disk when this is done.
    """
    source = ["--image-opts", *_secret(key_file), _open(path, depth, key_file)]
    process = await start("qemu-img", "convert", "-p", "-W", "-t", "writeback", "-O", format_, *source, _place(to))
    said = await _finish(process, advance)
    if process.returncode != 0:
        raise BackupFailed(f"{to}: {said[1]}")


async def rebase(path: Path, onto: str | None, advance: Callable[[float], None]) -> None:
    """Have an image take in what lies between it and ``onto``, its base from then on. BackupFailed; not crash-safe."""
    new = ["-b", onto, "-F", "qcow2"] if onto else ["-b", ""]
    process = await start("qemu-img", "rebase", "-p", "-f", "qcow2", *new, _place(path))
    said = await _finish(process, advance)
    if process.returncode != 0:
        raise BackupFailed(f"{path}: {said[1]}")


async def rewrite(
    path: Path, depth: int, to: Path, *, to_depth: int, key_file: Path, advance: Callable[[float], None]
) -> None:
    """Write all of an encrypted image, with what it is based on, into another one that is there. BackupFailed."""
    source, target = _open(path, depth, key_file), _open(to, to_depth, key_file)
    words = ["-p", "-n", *_secret(key_file), "--target-image-opts", "--image-opts", source, target]
    process = await start("qemu-img", "convert", *words)
    said = await _finish(process, advance)
    if process.returncode != 0:
        raise BackupFailed(f"{to}: {said[1]}")


async def is_in_use(path: Path, format_: Format) -> bool:
    """Whether another QEMU has locked an image. BackupFailed."""
    process = await start("qemu-img", "info", "-f", format_, _place(path))
    said = await _finish(process, None)
    return process.returncode != 0 and "lock" in said[1]


@contextlib.asynccontextmanager
async def serve(path: Path, *, depth: int = 1, key_file: Path | None = None) -> AsyncIterator[Path]:
    """Have an image written to over NBD, by one client, on the UNIX socket that this yields.

    It ends when that client has gone; left otherwise, it is killed. BackupFailed.
    """
    async with _serving(path, depth, key_file, "--discard=unmap") as (process, socket):
        yield socket
        try:
            async with asyncio.timeout(_END_S):
                if await process.wait() != 0:
                    raise BackupFailed(f"{path}: {(await _finish(process, None))[1]}")
        except TimeoutError as error:
            raise BackupFailed(f"{path}: the program that writes it hangs") from error


@contextlib.asynccontextmanager
async def show(path: Path, *, depth: int = 1, key_file: Path | None = None) -> AsyncIterator[Path]:
    """Have an image read over NBD, by clients of our own user, on the UNIX socket that this yields. BackupFailed."""
    async with _serving(path, depth, key_file, "--read-only", "--persistent", "--shared=0") as (_process, socket):
        yield socket


@contextlib.asynccontextmanager
async def _serving(
    path: Path, depth: int, key_file: Path | None, *options: str
) -> AsyncIterator[tuple[asyncio.subprocess.Process, Path]]:
    with tempfile.TemporaryDirectory(prefix="ballast-") as folder:
        socket, pid_file = Path(folder, "nbd"), Path(folder, "pid")
        words = ["--socket", str(socket), "--pid-file", str(pid_file), *options, *_secret(key_file)]
        process = await start("qemu-nbd", *words, "--image-opts", _open(path, depth, key_file))
        try:
            await _wait_ready(process, path, pid_file, _START_S * depth)  # to open an encrypted one takes seconds
            yield process, socket
        finally:
            await kill(process)


async def _wait_ready(process: asyncio.subprocess.Process, path: Path, pid_file: Path, patience_s: float) -> None:
    try:
        async with asyncio.timeout(patience_s):
            while not _is_there(pid_file):
                if process.returncode is not None:
                    raise BackupFailed(f"{path}: {(await _finish(process, None))[1]}")
                await asyncio.sleep(0.01)
    except TimeoutError as error:
        raise BackupFailed(f"{path}: the program that serves it hangs") from error


def _open(path: Path, depth: int, key_file: Path | None) -> str:
    """Name an image; the key is the same for all it is based on."""
    words = ["driver=qcow2", f"file.filename={escape(_place(path))}"]
    if key_file:
        words += [f"{'backing.' * level}encrypt.key-secret={_KEY}" for level in range(depth)]
    return ",".join(words)


def _place(path: Path) -> str:
    """Absolute, or qemu-img would take what stands before a colon for a protocol."""
    return str(path.absolute())


def _is_there(path: Path) -> bool:
    return path.exists()


def escape(text: str) -> str:
    """Make of a text the value of one of QEMU's options."""
    return text.replace(",", ",,")


def _secret(key_file: Path | None) -> list[str]:
    return ["--object", f"secret,id={_KEY},file={escape(str(key_file.absolute()))}"] if key_file else []


async def _qemu_img(*words: str) -> str:
    process = await start("qemu-img", *words)
    try:
        async with asyncio.timeout(QUICK_S):
            out, said = await _finish(process, None)
    except TimeoutError as error:
        raise BackupFailed(f"qemu-img {words[0]} hangs: {words[-1]}") from error
    if process.returncode != 0:
        raise BackupFailed(said)
    return out


async def start(*argv: str) -> asyncio.subprocess.Process:
    """Start a program that dies with us, with pipes for what it says. BackupFailed if it is not installed."""
    pipe = asyncio.subprocess.PIPE
    try:
        return await asyncio.create_subprocess_exec(
            *("setpriv", "--pdeathsig", "KILL", "--"), *argv, stdin=asyncio.subprocess.DEVNULL, stdout=pipe, stderr=pipe
        )
    except FileNotFoundError as error:
        raise BackupFailed(f"this needs {argv[0]}, which is not installed") from error


async def _finish(process: asyncio.subprocess.Process, advance: Callable[[float], None] | None) -> tuple[str, str]:
    """Wait for its end, whatever that is: what it printed, and what it said about it. Killed if we are cancelled."""
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        errors = asyncio.ensure_future(process.stderr.read())
        out = b""
        # Progress is written over itself: "    (1.00/100%)\r".
        while piece := await process.stdout.read(4096):
            out += piece if advance is None else b""
            _tell(piece, advance)
        await process.wait()
        return out.decode(errors="replace"), (await errors).decode(errors="replace").strip()[-_SAID_CHARS:]
    finally:
        await kill(process)


def _tell(piece: bytes, advance: Callable[[float], None] | None) -> None:
    if advance is not None and b"(" in piece:
        with contextlib.suppress(ValueError):
            advance(float(piece.rpartition(b"(")[2].partition(b"/")[0]) / 100)


async def kill(process: asyncio.subprocess.Process) -> None:
    """See that it ends; one that waits for a dead target in the kernel is left to that."""
    if process.returncode is None:
        process.kill()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_KILL_S):
                await process.wait()
