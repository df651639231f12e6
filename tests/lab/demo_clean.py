"""Is this file system clean? Runs on the host, on a throw-away copy: python -m tests.lab.demo_clean TYPE IMAGE

A correctly frozen file system still has a journal to replay and deleted files that were open; a checker complains of
both. So the check proper comes after one mount. Prints a JSON object: {"before": exit status of the check of the image
as it is, "after": that after mounting and unmounting it once, "said": what the second check said, "numbers": [first,
last] number of the demo writer's writes in it, "gaps": how many in between are missing, "deleted": whether the deleted
file is still to be seen}.

All in a mount namespace of its own: however it ends, the kernel unmounts and frees the loop device.
"""

import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.lab.demo_writers import CHUNK_BYTES, DELETED, FILE

CHECKS = {
    "ext4": ("e2fsck", "-fn"),
    "xfs": ("xfs_repair", "-n"),
    "btrfs": ("btrfs", "check", "--readonly"),
}
TIMEOUT_S = 60


def check(type_: str, image: str) -> "subprocess.CompletedProcess[str]":
    """Run the file system's own checker, changing nothing."""
    return subprocess.run([*CHECKS[type_], image], check=False, capture_output=True, text=True, timeout=TIMEOUT_S)


def read_writes(folder: Path) -> dict[str, Any]:
    """Which writes of the demo's writer are in a mounted file system."""
    with (folder / FILE).open("rb") as file:
        size = file.seek(0, 2)
        heads = []
        for offset in range(0, size - CHUNK_BYTES + 1, CHUNK_BYTES):
            file.seek(offset)
            heads.append(struct.unpack("Q", file.read(8))[0])
    first, last = min(heads), max(heads)
    return {
        "numbers": [first, last],
        "gaps": last - first + 1 - len(set(heads)),
        "deleted": (folder / DELETED).exists(),
    }


def inspect(type_: str, image: str) -> dict[str, Any]:
    """Check, mount once, unmount, check again. Raises subprocess.SubprocessError, OSError."""
    folder = Path(f"{image}.mounted")
    folder.mkdir()
    before = check(type_, image)
    # The option is for a host that has a file system of the same identity mounted.
    options = "loop,nouuid" if type_ == "xfs" else "loop"
    subprocess.run(["mount", "-t", type_, "-o", options, image, str(folder)], check=True, timeout=TIMEOUT_S)
    try:
        writes = read_writes(folder)
    finally:
        subprocess.run(["umount", str(folder)], check=True, timeout=TIMEOUT_S)
    after = check(type_, image)
    said = f"{after.stdout}{after.stderr}"
    return {"before": before.returncode, "after": after.returncode, "said": said, **writes}


if __name__ == "__main__":
    try:
        print(json.dumps(inspect(*sys.argv[1:])))
    except (OSError, subprocess.SubprocessError) as error:
        sys.exit(f"demo: {error}")
