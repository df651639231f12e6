"""The kernel's own balloons, from what their drivers show."""

from __future__ import annotations

from pathlib import Path

import pytest

from ballast.guest.linux.balloon_drivers import (
    Counters,
    find_driver,
    parse_balloon_kib,
    parse_counters,
    parse_hv_balloon,
)
from ballast.guest.linux.tree import Tree

VMSTAT = "balloon_migrate_x 9\nballoon_inflate 131072\nballoon_deflate 72\nballoon_migrate 5\nswap_ra 0"
HV = "host_version : 2.0\npage_size : 4096\npages_added : 0\npages_ballooned : 262144\nnew : x y"


@pytest.mark.parametrize("text", ["", "balloon_inflate 5", "xballoon_inflate 5\nxballoon_deflate 5"])
def test_counters_that_are_not_there(text: str) -> None:
    assert parse_counters(text) is None


@pytest.mark.parametrize("text", ["balloon_inflate x\nballoon_deflate 1", "balloon_inflate 5 6\nballoon_deflate 1"])
def test_counters_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="invalid literal"):
        parse_counters(text)


def test_counters() -> None:
    assert parse_counters(VMSTAT) == Counters(131072, 72, 5)
    assert parse_counters("balloon_inflate 1\nballoon_deflate 2") == Counters(1, 2, 0)


def test_the_line_of_meminfo() -> None:
    assert parse_balloon_kib("MemTotal:  1 kB\nBalloon:           524288 kB\n") == 524288
    assert parse_balloon_kib("MemTotal:  1 kB\n") is None


@pytest.mark.parametrize("text", ["", "page_size : 4096", "page_size : 4096\npages_ballooned : ?"])
def test_hv_balloon_without_its_size(text: str) -> None:
    assert parse_hv_balloon(text) is None


def test_hv_balloon() -> None:
    assert parse_hv_balloon(HV) == 1 << 30


@pytest.mark.parametrize(
    ("paths", "driver"),
    [
        ([], None),
        (["sys/bus/virtio/drivers/virtio_balloon/bind", "sys/bus/virtio/drivers/virtio_balloon/module"], None),
        (["sys/bus/virtio/drivers/virtio_balloon/virtio3"], "virtio_balloon"),
        (["sys/bus/vmbus/drivers/hv_balloon/1eccfd72-4b41-45ef-b73a-4a6e44c12924"], "hv_balloon"),
        (["sys/bus/vmbus/drivers/hv_balloon/uevent"], None),
        (["sys/module/vmw_balloon/refcnt"], "vmw_balloon"),
    ],
)
def test_a_driver_counts_with_a_device(tmp_path: Path, paths: list[str], driver: str | None) -> None:
    tree = Tree(tmp_path)
    for path in paths:
        tree.path(path).parent.mkdir(parents=True, exist_ok=True)
        tree.path(path).touch()
    assert find_driver(tree) == driver
