"""Free frames are counted, all of them or by a sample."""

from __future__ import annotations

import pytest

from ballast.guest.linux.kpageflags import KPAGEFLAGS, count_free_bytes
from tests.unit.guest.conftest import MakeTree

MIB = 1 << 20
FREE, USED = (1 << 10).to_bytes(8, "little"), (1 << 5 | 1 << 10 << 2).to_bytes(8, "little")


@pytest.mark.parametrize(
    ("first_mib", "mib", "free_mib"), [(0, 2, 0), (2, 2, 2), (0, 4, 2), (3, 1, 1), (4, 2, 1), (0, 6, 3), (8, 2, 0)]
)
def test_every_frame_of_a_small_range(make_tree: MakeTree, first_mib: int, mib: int, free_mib: int) -> None:
    """2 MiB in use, 2 free, 2 by turns; beyond the end there is nothing."""
    tree = make_tree({KPAGEFLAGS: ""})
    tree.path(KPAGEFLAGS).write_bytes(USED * 512 + FREE * 512 + (FREE + USED) * 256)
    assert count_free_bytes(tree, first_mib * MIB, mib * MIB) == free_mib * MIB


def test_a_sample_of_a_large_one(make_tree: MakeTree) -> None:
    """Every fourth stretch of 2 MiB is looked at, from the first on."""
    tree = make_tree({KPAGEFLAGS: ""})
    tree.path(KPAGEFLAGS).write_bytes((FREE * 512 + USED * 1536) * 32 + USED * 2048 * 32)
    assert count_free_bytes(tree, 0, 512 * MIB) == 256 * MIB


def test_without_the_file_it_is_an_error(make_tree: MakeTree) -> None:
    with pytest.raises(FileNotFoundError):
        count_free_bytes(make_tree({}), 0, MIB)
