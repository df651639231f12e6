"""Which control groups count. That their triggers fire, and what becomes of removed ones, is shown in guests."""

from __future__ import annotations

import asyncio
import logging

import pytest

from ballast.guest.memory.groups import ROOT, Groups
from ballast.wire.memory_names import PsiTrigger
from tests.unit.guest.conftest import MakeTree

DEADLINE_MS = 10_000
TRIGGER = PsiTrigger("some", 100_000, 1_000_000)


def stalls(number: int) -> str:
    return "".join(f"{kind} avg10=0.00 avg60=0.00 avg300=0.00 total={number}\n" for kind in ("some", "full"))


def files(*groups: str) -> dict[str, str]:
    found = {f"{ROOT}/{name}/memory.pressure": stalls(number) for number, name in enumerate(groups, 1)}
    return found | {f"{ROOT}/{name}": "" for name in ("cgroup.controllers", "memory.pressure", "cpu.stat")}


def test_top_level_groups_count_but_ours_and_mounts(make_tree: MakeTree) -> None:
    names = (
        "system.slice",
        "user.slice",
        "init.scope",
        "docker",
        "ballast.slice",
        "dev-mqueue.mount",
        "system.slice/a",
    )
    assert set(Groups(make_tree(files(*names)), (), ()).read()) == {
        "system.slice",
        "user.slice",
        "init.scope",
        "docker",
    }


def test_chosen_groups_count_once_where_they_are_there(make_tree: MakeTree) -> None:
    tree = make_tree(files("system.slice", "system.slice/db.service", "system.slice/other.service"))
    groups = Groups(tree, ("system.slice/db.service", "system.slice", "system.slice/absent.service"), ())
    assert {name: read.some.total_us for name, read in groups.read().items()} == {
        "system.slice": 1,
        "system.slice/db.service": 2,
    }


@pytest.mark.parametrize("text", ["", "garbage", "some avg10=0.00 avg60=0.00 avg300=0.00 total=1\n"])
def test_a_group_that_cannot_be_read_is_left_out(make_tree: MakeTree, text: str) -> None:
    tree = make_tree(files("system.slice", "user.slice") | {f"{ROOT}/user.slice/memory.pressure": text})
    assert set(Groups(tree, (), ()).read()) == {"system.slice"}


@pytest.mark.parametrize("there", [{}, {f"{ROOT}/memory/x": ""}, files()])
def test_without_groups_that_are_measured_there_are_no_readings(make_tree: MakeTree, there: dict[str, str]) -> None:
    assert Groups(make_tree(there), ("a/b",), ()).read() == {}


async def test_groups_that_come_and_go_are_noticed_without_being_asked(
    make_tree: MakeTree, caplog: pytest.LogCaptureFixture
) -> None:
    """No folder here lets us arm triggers; that it was tried is in the journal."""
    tree = make_tree(files("system.slice"))
    chosen = "machine.slice/vm.scope"
    groups = Groups(tree, (chosen,), [TRIGGER])

    def come(name: str) -> None:
        """With its files, as the kernel's do."""
        where = name.replace("/", "-")
        make_tree({f"elsewhere/{where}/memory.pressure": stalls(1)})
        tree.path(f"{ROOT}/{name}").symlink_to(tree.path(f"elsewhere/{where}"))

    async def wait_for(*names: str) -> None:
        for _ in range(DEADLINE_MS):
            if {name for name, _ in groups._armed} == set(names):
                return
            await asyncio.sleep(0.001)
        raise AssertionError(groups._armed)

    with caplog.at_level(logging.WARNING):
        groups.watch(lambda _kind: None)
        await wait_for("system.slice")
        come("machine.slice")
        come("new")
        await wait_for("system.slice", "machine.slice", "new")
        tree.path(f"{ROOT}/new").unlink()
        come(chosen)
        await wait_for("system.slice", "machine.slice", chosen)
        tree.path(f"{ROOT}/{chosen}").unlink()
        await wait_for("system.slice", "machine.slice")
    groups.close()
    assert not groups.is_armed
    tried = {line.split()[7].removesuffix(":") for line in caplog.messages}
    assert tried == {"system.slice", "machine.slice", "new", chosen}
