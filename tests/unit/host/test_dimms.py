"""DIMMs in and out, against a fake QEMU and a fake agent: what is undone when a part fails."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ballast.host import dimms
from ballast.host.cli import main
from ballast.host.dimms import Dimm, choose_dimms
from ballast.host.machine import NotReclaimable
from tests.unit.host.fake import FakeAgent, Refusal
from tests.unit.host.fake import serve_in_thread as serve_agent
from tests.unit.host.fake_qmp import BASE, FakeQemu
from tests.unit.host.fake_qmp import serve_in_thread as serve_qemu

GIB = 1 << 30
BLOCK_BYTES = 1 << 27
FIRST = BASE // BLOCK_BYTES


@pytest.fixture
def qemu(tmp_path: Path) -> Iterator[FakeQemu]:
    """A QEMU without DIMMs."""
    with serve_qemu(tmp_path / "qmp.sock") as fake:
        yield fake


@pytest.fixture
def agent(tmp_path: Path, qemu: FakeQemu) -> Iterator[FakeAgent]:
    """An agent that has the blocks of QEMU's DIMMs, and does as it is told."""

    def blocks(_: dict[str, Any]) -> list[dict[str, Any]]:
        sizes = sum(qemu.objects[memdev] for memdev in qemu.dimms.values())
        return [{"phys-index": FIRST + number, "online": True} for number in range(sizes // BLOCK_BYTES)]

    def online(arguments: dict[str, Any]) -> dict[str, Any]:
        results = [{"phys-index": one, "zone": "movable", "result": "already"} for one in arguments["blocks"]]
        return {"bytes": 0, "blocks": results}

    def offline(arguments: dict[str, Any]) -> dict[str, Any]:
        dimm = {"address": arguments["dimm"], "bytes": GIB, "offline": True}
        return {"bytes": GIB, "blocks": [], "dimms": [dimm]}

    with serve_agent(tmp_path / "agent.sock") as fake:
        fake.answers["guest-get-memory-blocks"] = blocks
        fake.answers["ballast-memory-online"] = online
        fake.answers["ballast-memory-offline"] = offline
        yield fake


def ctl(agent: FakeAgent, qemu: FakeQemu, *words: str) -> int:
    """Run ballastctl memory."""
    return main(["memory", *words, agent.target, "--qmp", f"unix:{qemu.path}"])


def failed(index: int, reason: str) -> dict[str, Any]:
    """A block that could not be changed."""
    return {"phys-index": index, "zone": "movable", "result": "failed", "reason": reason}


def test_memory_is_added_and_removed(agent: FakeAgent, qemu: FakeQemu, capfd: pytest.CaptureFixture[str]) -> None:
    assert ctl(agent, qemu, "add", "1G") == 0
    out = capfd.readouterr().out
    assert "ballast-0: 1 GiB added" in out
    assert "movable" in out
    assert ctl(agent, qemu, "add", "512M", "--json") == 0
    added = json.loads(capfd.readouterr().out)
    assert (added["id"], added["address"], len(added["blocks"])) == ("ballast-1", BASE + GIB, 4)
    assert ctl(agent, qemu, "remove", "1.5G") == 0
    assert "1.5 GiB removed" in capfd.readouterr().out
    assert (qemu.dimms, qemu.objects) == ({}, {"ram": GIB})
    asked = [arguments["dimm"] for name, arguments in agent.asked if name == "ballast-memory-offline"]
    assert asked == [BASE + GIB, BASE]


@pytest.mark.parametrize(
    ("size", "status", "problem"),
    [("100M", 2, "must be a multiple of the guest's memory blocks of 128 MiB"), ("0", 2, "must be a multiple")],
)
def test_a_size_that_is_no_number_of_blocks_is_2(
    agent: FakeAgent, qemu: FakeQemu, capfd: pytest.CaptureFixture[str], size: str, status: int, problem: str
) -> None:
    assert ctl(agent, qemu, "add", size) == status
    assert problem in capfd.readouterr().err
    assert qemu.asked == ["qmp_capabilities"]


def test_a_dimm_that_qemu_refuses_leaves_nothing(
    agent: FakeAgent, qemu: FakeQemu, capfd: pytest.CaptureFixture[str]
) -> None:
    qemu.refuse["device_add"] = "no slots"
    assert ctl(agent, qemu, "add", "1G") == 1
    assert "QEMU refused device_add: no slots" in capfd.readouterr().err
    assert qemu.objects == {"ram": GIB}


def test_a_block_that_does_not_come_online_undoes_all(
    agent: FakeAgent, qemu: FakeQemu, capfd: pytest.CaptureFixture[str]
) -> None:
    agent.answers["ballast-memory-online"] = {"bytes": 0, "blocks": [failed(FIRST + 2, "EIO")]}
    assert ctl(agent, qemu, "add", "1G") == 1
    assert f"block {FIRST + 2} cannot be brought online: EIO" in capfd.readouterr().err
    assert (qemu.dimms, qemu.objects) == ({}, {"ram": GIB})


def test_a_guest_that_does_not_see_the_dimm_undoes_all(
    agent: FakeAgent, qemu: FakeQemu, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dimms, "APPEAR_TIMEOUT_S", 0.3)
    agent.answers["guest-get-memory-blocks"] = []
    assert ctl(agent, qemu, "add", "1G") == 1
    assert "the guest does not see ballast-0 within 0.3 s" in capfd.readouterr().err
    assert (qemu.dimms, agent.count("ballast-memory-offline")) == ({}, 0)


def test_a_block_in_use_is_named_and_all_is_online_again(
    agent: FakeAgent, qemu: FakeQemu, capfd: pytest.CaptureFixture[str]
) -> None:
    qemu.plug("ballast-0", GIB)
    results = [failed(FIRST, "not-tried"), failed(FIRST + 1, "EBUSY"), failed(FIRST + 2, "undone")]
    agent.answers["ballast-memory-offline"] = {"bytes": 0, "blocks": results, "dimms": []}
    assert ctl(agent, qemu, "remove", "1G", "--json") == 1
    (removal,) = json.loads(capfd.readouterr().out)["dimms"]
    assert (removal["result"], removal["reason"]) == ("failed", f"block {FIRST + 1} stays in use: EBUSY")
    assert agent.asked[-1] == ("ballast-memory-online", {"blocks": list(range(FIRST, FIRST + 8))})
    assert list(qemu.dimms) == ["ballast-0"]


@pytest.mark.parametrize(
    ("event", "problem"),
    [
        ("DEVICE_UNPLUG_GUEST_ERROR", "the guest's kernel refused to let ballast-0 go"),
        ("MEM_UNPLUG_ERROR", "refused to let ballast-0 go"),
        (None, "the guest does not let ballast-0 go within 0.3 s"),
    ],
)
def test_a_dimm_that_does_not_come_off_is_online_again(
    agent: FakeAgent,
    qemu: FakeQemu,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    event: str | None,
    problem: str,
) -> None:
    monkeypatch.setattr(dimms, "UNPLUG_TIMEOUT_S", 0.3)
    qemu.plug("ballast-0", GIB)
    qemu.unplug_event = event
    agent.answers["ballast-memory-online"] = {"bytes": 0, "blocks": [failed(FIRST, "EIO")]}
    assert ctl(agent, qemu, "remove", "1G") == 1
    out = capfd.readouterr().out
    assert problem in out
    assert f"blocks {FIRST} stay offline" in out
    assert (list(qemu.dimms), qemu.objects) == (["ballast-0"], {"ram": GIB, "ballast-0": GIB})


def test_one_of_two_that_comes_off_is_5(agent: FakeAgent, qemu: FakeQemu) -> None:
    qemu.plug("ballast-0", GIB)
    qemu.plug("ballast-1", GIB)
    answers = iter([Refusal("busy", "others are under way"), agent.answers["ballast-memory-offline"]])

    def offline(arguments: dict[str, Any]) -> Any:
        answer = next(answers)
        return answer(arguments) if callable(answer) else answer

    agent.answers["ballast-memory-offline"] = offline
    assert ctl(agent, qemu, "remove", "2G") == 5
    assert list(qemu.dimms) == ["ballast-1"]


def dimm(name: str, gib: int, number: int) -> Dimm:
    """A DIMM of so many GiB."""
    return Dimm(name, BASE + number * 64 * GIB, gib * GIB, f"memory-{name}")


DIMMS = [dimm("mine", 3, 0), dimm("ballast-0", 1, 1), dimm("ballast-1", 1, 2), dimm("ballast-2", 2, 3)]


@pytest.mark.parametrize(
    ("gib", "expected"),
    [
        (1, ["ballast-1"]),
        (2, ["ballast-2"]),
        (3, ["ballast-2", "ballast-1"]),
        (4, ["ballast-2", "ballast-1", "ballast-0"]),
        (5, ["ballast-2", "mine"]),
        (7, ["ballast-2", "ballast-1", "ballast-0", "mine"]),
    ],
)
def test_our_own_dimms_come_off_first_and_the_last_ones(gib: int, expected: list[str]) -> None:
    assert [one.id for one in choose_dimms(DIMMS, gib * GIB)] == expected


def test_what_no_dimms_are_in_all_is_refused_with_what_there_is() -> None:
    with pytest.raises(NotReclaimable, match="no choice of them is 8 GiB: mine 3 GiB, ballast-0 1 GiB"):
        choose_dimms(DIMMS, 8 * GIB)


def test_what_no_dimms_make_up_is_4(agent: FakeAgent, qemu: FakeQemu, capfd: pytest.CaptureFixture[str]) -> None:
    assert ctl(agent, qemu, "remove", "1G") == 4
    assert "no choice of them is 1 GiB: none" in capfd.readouterr().err
