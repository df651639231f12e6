"""A backup whose guest is the test, of any source: read as it is served, compared with what the disks held."""

from __future__ import annotations

import asyncio

import nbd

from ballast.host.storage.source import Export, Source
from tests.lab.still_machine import Played


def read(export: Export, onto: bytes | None) -> bytes:
    """Read an export whole, or what its bitmap marks onto an older content."""
    content = bytearray(onto or b"")
    client = nbd.NBD()
    client.set_export_name(export.name)
    if export.bitmap:
        client.add_meta_context(export.bitmap)
    client.connect_unix(str(export.socket))
    size = client.get_size()
    if onto is None:
        step = 1 << 20
        content = bytearray(b"".join(client.pread(min(step, size - at), at) for at in range(0, size, step)))
    else:
        assert export.bitmap
        extents: list[int] = []
        at = 0

        def note(_context: str, offset: int, entries: list[int], _error: object) -> int:
            extents[:] = entries
            return 0

        while at < size:
            client.block_status(size - at, at, note)
            for length, flags in zip(extents[::2], extents[1::2], strict=True):
                if flags & 1:
                    content[at : at + length] = client.pread(length, at)
                at += length
    client.shutdown()
    return bytes(content)


async def back_up(
    source: Source, machine: Played, new: str, base: str | None, onto: dict[str, bytes] | None = None
) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """Back up, with the guest writing at every moment: what was held at the cut, and what was read."""
    await source.survey(base)
    machine.scribble(3)
    await source.prepare(new, base)
    machine.scribble(3)
    await source.cut()
    held = machine.snapshot()
    machine.scribble(10)
    exports = await source.exports()
    machine.scribble(10)
    got = {
        export.disk: await asyncio.to_thread(read, export, onto[export.disk] if onto and base else None)
        for export in exports
    }
    return held, got
