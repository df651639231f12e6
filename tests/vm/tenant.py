"""Runs inside the guest: a program that uses memory, changes it all the time, and knows what must be in it.

    tenant.py NAME ANON_MIB SHM_MIB FILE FILE_MIB

It fills anonymous memory, a tmpfs file and the page cache of FILE (made if absent), prints "filled", and overwrites
pages of the first two, looking at each before, until NAME.stop exists in /run. Then it looks at every page and prints
{"pages", "changed", "bad": [what, page]...}; FILE's pages are read once from the cache and once from the disk.
"""

from __future__ import annotations

import json
import mmap
import os
import random
import struct
import sys
import time
from pathlib import Path

PAGE = mmap.PAGESIZE
MIB_PAGES = (1 << 20) // PAGE
BATCH = 64
REST_S = 0.01


class Pages:
    """Pages of one mapping, and how often each was written; no two pages are ever alike, nor one to its own past."""

    def __init__(self, name: str, memory: mmap.mmap, noise: bytes) -> None:
        self.name = name
        self.count = len(memory) // PAGE
        self.changed = 0
        self.bad: list[tuple[str, int]] = []
        self._memory = memory
        self._noise = noise
        self._writes = [0] * self.count

    def expected(self, page: int) -> bytes:
        """What must be in a page now."""
        start = (31 * page + 7 * self._writes[page]) % PAGE
        return self._noise[start : start + PAGE - 16] + struct.pack("<QQ", page, self._writes[page])

    def write(self, page: int) -> None:
        """Give a page its content."""
        self._memory[page * PAGE : (page + 1) * PAGE] = self.expected(page)

    def look(self, page: int) -> None:
        """Note a page that is not as it was written."""
        if self._memory[page * PAGE : (page + 1) * PAGE] != self.expected(page):
            self.bad.append((self.name, page))

    def change(self) -> None:
        """Look at some page, and write it anew."""
        page = random.randrange(self.count)
        self.look(page)
        self._writes[page] += 1
        self.write(page)
        self.changed += 1


def noise(seed: str) -> bytes:
    """Two pages of noise, the same for the same seed."""
    return random.Random(seed).randbytes(2 * PAGE)


def fill(name: str, memory: mmap.mmap) -> Pages:
    """Write every page."""
    pages = Pages(name, memory, noise(f"{name}{os.getpid()}"))
    for page in range(pages.count):
        pages.write(page)
    return pages


def share(path: Path, mib: int) -> mmap.mmap:
    """A new file on a tmpfs, mapped; it has no name any more."""
    with path.open("w+b") as file:
        file.truncate(mib << 20)
        path.unlink()
        return mmap.mmap(file.fileno(), mib << 20)


def make_file(path: Path, mib: int) -> None:
    """Write the disk file if it is not there, and take it out of the cache."""
    if not path.exists():
        part = path.with_suffix(".part")
        with part.open("wb") as file:
            file.truncate(mib << 20)
        with part.open("r+b") as written, mmap.mmap(written.fileno(), 0) as memory:
            pages = Pages("file", memory, noise("file"))
            for page in range(pages.count):
                pages.write(page)
            memory.flush()
            os.fsync(written.fileno())
        part.rename(path)
    with path.open("rb") as cached:
        os.posix_fadvise(cached.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def look_at_file(path: Path, what: str, flags: int) -> Pages:
    """Read the disk file, by the cache or beside it (O_DIRECT), and look at each page."""
    buffer = mmap.mmap(-1, 1 << 20)
    descriptor = os.open(path, os.O_RDONLY | flags)
    file = Pages(what, mmap.mmap(descriptor, 0, prot=mmap.PROT_READ), noise("file"))
    for first in range(0, file.count, MIB_PAGES):
        os.preadv(descriptor, [buffer], first * PAGE)
        for page in range(first, first + MIB_PAGES):
            at = (page - first) * PAGE
            if buffer[at : at + PAGE] != file.expected(page):
                file.bad.append((what, page))
    os.close(descriptor)
    return file


def main() -> None:
    """Fill, change until told to stop, look at everything."""
    name, anon_mib, shm_mib, path, file_mib = sys.argv[1:]
    stop = Path(f"/run/{name}.stop")
    file = Path(path)
    used = [fill("anonymous", mmap.mmap(-1, int(anon_mib) << 20))]
    used.append(fill("tmpfs", share(Path("/dev/shm", name), int(shm_mib))))  # noqa: S108 - a tmpfs is what is wanted
    make_file(file, int(file_mib))
    look_at_file(file, "cache", 0)
    sys.stdout.write("filled\n")
    sys.stdout.flush()
    while not stop.exists():
        for _ in range(BATCH):
            random.choice(used).change()
        time.sleep(REST_S)  # the guest has other things to do as well
    for pages in used:
        for page in range(pages.count):
            pages.look(page)
    used += [look_at_file(file, "cache", 0), look_at_file(file, "disk", os.O_DIRECT)]
    report = {
        "pages": sum(pages.count for pages in used),
        "changed": sum(pages.changed for pages in used),
        "bad": [bad for pages in used for bad in pages.bad],
    }
    sys.stdout.write(json.dumps(report) + "\n")


if __name__ == "__main__":
    main()
