"""Zones and ranges of RAM."""

from __future__ import annotations

from ballast.guest.linux.tree import Tree
from ballast.guest.linux.zones import ZonePages, parse_ram_ranges, parse_zoneinfo

ZONEINFO = """\
Node 0, zone      DMA
  per-node stats
      nr_inactive_anon 5
  pages free     3840
        boost    0
        spanned  4095
        present  3998
        managed  3840
        later    99
Node 0, zone    DMA32
        present  258048
      nr_free_pages 77
      nr_zone_inactive_anon 9
      nr_zone_inactive_file 100
      nr_zone_active_file 20
Node 0, zone   Normal
        present  0
Node 0, zone  Movable
  pages free     5000
        spanned  65536
        present  32768
      nr_zone_active_file 3000
Node 1, zone   Normal
        present  1000
Node 1, zone  Movable
        present  2000
Node 1, zone   Device
        present  0
"""


def test_present_pages_of_all_nodes_add_up() -> None:
    assert parse_zoneinfo(ZONEINFO) == ZonePages(
        movable_pages=34768, kernel_pages=3998 + 258048 + 1000, kernel_reclaimable_pages=3840 + 100 + 20
    )


def test_no_zones_are_no_pages() -> None:
    assert parse_zoneinfo("") == parse_zoneinfo("garbage\n   present x\n") == ZonePages(0, 0, 0)


def test_ram_is_what_stands_at_the_top_level() -> None:
    text = """\
00000000-00000fff : Reserved
00001000-0009fbff : System RAM
00100000-3ffdefff : System RAM
  01000000-01ffffff : Kernel code
  02000000-02ffffff : System RAM
100000000-10fffffff : System RAM (kmem)
"""
    assert parse_ram_ranges(text) == [(0x1000, 0x9EC00), (0x100000, 0x3FEDF000), (0x100000000, 0x10000000)]


def test_what_an_unprivileged_reader_is_shown_are_no_ranges() -> None:
    assert parse_ram_ranges("00000000-00000000 : System RAM\n00000000-00000000 : Reserved\n") == []


def test_recorded(recorded: Tree) -> None:
    """1 GiB of boot memory, 256 MiB online movable, 256 MiB offline."""
    zones = parse_zoneinfo(recorded.read("proc/zoneinfo"))
    assert 4096 * zones.movable_pages == 256 << 20
    assert (1 << 30) - (2 << 20) < 4096 * zones.kernel_pages <= 1 << 30
    assert zones.kernel_pages // 2 < zones.kernel_reclaimable_pages < zones.kernel_pages
    assert parse_ram_ranges(recorded.read("proc/iomem"))[-2:] == [
        (1 << 32, 256 << 20),
        ((1 << 32) + (256 << 20), 256 << 20),
    ]
