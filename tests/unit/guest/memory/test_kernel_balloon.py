"""When the kernel's own balloon keeps ours empty, and what the status tells of it."""

from __future__ import annotations

import pytest

from ballast.guest.events import Events
from ballast.guest.linux.tree import Tree
from ballast.guest.memory.balloon import Balloon
from ballast.guest.memory.holder_protocol import CHUNK_BYTES
from ballast.guest.memory.kernel_balloon import BalloonMode, kernel_balloon, refusal
from ballast.wire.errors import NotSupported
from ballast.wire.memory_names import KernelBalloon

PAGE_BYTES = 4096
HYPERV = "sys/bus/vmbus/drivers/hv_balloon/1eccfd72-4b41-45ef-b73a-4a6e44c12924"


def plug(tree: Tree, device: str = "sys/bus/virtio/drivers/virtio_balloon/virtio3") -> None:
    """The driver has a device."""
    tree.path(device).mkdir(parents=True)


def count(tree: Tree, inflated: int, deflated: int, migrated: int = 0) -> None:
    """What the kernel has counted since boot."""
    lines = [line for line in tree.read("proc/vmstat").splitlines() if not line.startswith("balloon_")]
    lines += [f"balloon_inflate {inflated}", f"balloon_deflate {deflated}", f"balloon_migrate {migrated}"]
    tree.path("proc/vmstat").write_text("\n".join(lines) + "\n")


def test_none(recorded: Tree) -> None:
    assert kernel_balloon(recorded) is None
    assert refusal(recorded, "auto") is None


def test_one_that_was_never_used_is_told_of_and_in_nobodys_way(recorded: Tree) -> None:
    plug(recorded)
    count(recorded, 0, 0)
    assert kernel_balloon(recorded) == KernelBalloon("virtio_balloon", 0, 0, 0, 0)
    assert refusal(recorded, "auto") is None


@pytest.mark.parametrize(("inflated", "deflated"), [(300, 100), (300, 300)])
def test_one_that_is_or_was_used_keeps_ours_empty(recorded: Tree, inflated: int, deflated: int) -> None:
    plug(recorded)
    count(recorded, inflated, deflated, 7)
    told = kernel_balloon(recorded)
    assert told is not None
    assert told.bytes == (inflated - deflated) * PAGE_BYTES
    assert (told.inflated_bytes, told.deflated_bytes) == (inflated * PAGE_BYTES, deflated * PAGE_BYTES)
    assert told.migrated_bytes == 7 * PAGE_BYTES
    assert "virtio_balloon" in (refusal(recorded, "auto") or "")
    assert refusal(recorded, "always") is None


def test_one_whose_size_nobody_can_tell_counts_as_used(recorded: Tree) -> None:
    plug(recorded, HYPERV)
    count(recorded, 0, 0)  # not hv_balloon's
    assert kernel_balloon(recorded) == KernelBalloon("hv_balloon", None)
    assert "hv_balloon" in (refusal(recorded, "auto") or "")


def test_hv_balloon_tells_in_debugfs(recorded: Tree) -> None:
    plug(recorded, HYPERV)
    debug = recorded.path("sys/kernel/debug/hv-balloon")
    debug.parent.mkdir(parents=True)
    debug.write_text("page_size : 4096\npages_ballooned : 512\n")
    assert kernel_balloon(recorded) == KernelBalloon("hv_balloon", 2 << 20)


@pytest.mark.parametrize(("mode", "reason"), [("off", "switched off"), ("auto", "virtio_balloon")])
async def test_inflating_is_refused_with_the_reason(recorded: Tree, mode: BalloonMode, reason: str) -> None:
    plug(recorded)
    count(recorded, 1, 0)
    balloon = Balloon(recorded, Events(), boot_id="b", mode=mode)
    with pytest.raises(NotSupported, match=reason):
        await balloon.inflate(CHUNK_BYTES)
    assert (await balloon.inflate(0)).done
