"""ballastctl balloon and offline against a fake agent. What is punched is tested with real memory, in tests/kernel."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ballast.host.cli import main
from tests.unit.host.fake import MEMORY, FakeAgent, Refusal, serve_in_thread

MIB = 1 << 20
CHUNK_BYTES = 64 * MIB
Run = Callable[..., tuple[int, str, str]]


class Balloon:
    """A guest's balloon as docs/protocol.md has it."""

    def __init__(self, agent: FakeAgent) -> None:
        self.agent = agent
        self.bytes = 0
        self.waiting: int | None = None
        self.floor_bytes = 512 * MIB
        self.chunks = 0
        self.acked: list[dict[str, Any]] = []
        agent.answers |= {
            "ballast-memory-status": lambda _: MEMORY | {"balloon": {"bytes": self.bytes, "target-bytes": 0}},
            "ballast-balloon-inflate": self.inflate,
            "ballast-balloon-ack": self.ack,
            "ballast-balloon-deflate": self.deflate,
        }

    def inflate(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Take a chunk, or name the waiting one."""
        target_bytes = arguments["target-bytes"]
        if self.waiting is None:
            self.waiting = min(CHUNK_BYTES, target_bytes - self.bytes, self.floor_bytes - self.bytes)
            self.bytes += self.waiting
            self.chunks += 1
        taken = self.waiting
        self.waiting = self.waiting or None
        is_done = self.bytes >= target_bytes
        return {
            "chunk": self.chunks if taken else None,
            "bytes": taken,
            "total-bytes": self.bytes,
            "ranges": [[1 << 32, taken]] if taken else [],
            "done": is_done,
            "floor": not is_done and self.bytes >= self.floor_bytes,
        }

    def ack(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """The chunk is one of many."""
        self.acked.append(arguments)
        self.waiting = None
        return {}

    def deflate(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Give back."""
        given = max(0, self.bytes - arguments["target-bytes"])
        self.bytes -= given
        return {"bytes": given, "total-bytes": self.bytes, "ranges": [[1 << 32, given]] if given else []}


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[FakeAgent]:
    """Answers while ``main`` runs its own loop."""
    with serve_in_thread(tmp_path / "agent.sock") as fake:
        yield fake


@pytest.fixture
def balloon(agent: FakeAgent) -> Balloon:
    """The agent's balloon."""
    return Balloon(agent)


@pytest.fixture
def ctl(agent: FakeAgent, capfd: pytest.CaptureFixture[str]) -> Run:
    """Run ``ballastctl WORDS TARGET``; status, stdout and stderr."""

    def run(*words: str, options: tuple[str, ...] = ()) -> tuple[int, str, str]:
        return main([*words, agent.target, *options]), *capfd.readouterr()

    return run


def test_it_inflates_chunk_by_chunk_and_acknowledges_each(ctl: Run, balloon: Balloon) -> None:
    status, out, _ = ctl("balloon", "set", "160M", options=("--no-reclaim", "--json"))
    assert (status, balloon.bytes) == (0, 160 * MIB)
    assert balloon.acked == [{"chunk": number, "punched-bytes": 0} for number in (1, 2, 3)]
    assert json.loads(out) == {
        "target-bytes": 160 * MIB,
        "total-bytes": 160 * MIB,
        "chunks": 3,
        "taken-bytes": 160 * MIB,
        "given-back-bytes": 0,
        "punched-bytes": 0,
        "freed-bytes": 0,
        "not-zero-bytes": 0,
        "stopped": "done",
    }


def test_it_deflates_without_qemu(ctl: Run, balloon: Balloon, tmp_path: Path) -> None:
    balloon.bytes = 256 * MIB
    status, out, _ = ctl("balloon", "set", "64M", options=("--qmp", str(tmp_path / "absent")))
    assert (status, balloon.bytes) == (0, 64 * MIB)
    assert "192 MiB" in out


def test_a_guest_that_gave_back_more_than_it_was_to_is_5(ctl: Run, balloon: Balloon) -> None:
    balloon.bytes = 256 * MIB
    balloon.agent.answers["ballast-balloon-deflate"] = {"bytes": 0, "total-bytes": 0, "ranges": []}
    status, out, _ = ctl("balloon", "set", "64M", options=("--no-reclaim",))
    assert status == 5
    assert "the guest needs its memory" in out


def test_a_chunk_that_waits_from_before_is_finished(ctl: Run, balloon: Balloon) -> None:
    balloon.inflate({"target-bytes": 64 * MIB})
    assert ctl("balloon", "set", "64M", options=("--no-reclaim",))[0] == 0
    assert [one["chunk"] for one in balloon.acked] == [1]


def test_the_guests_floor_is_5(ctl: Run, balloon: Balloon) -> None:
    status, out, _ = ctl("balloon", "set", "1G", options=("--no-reclaim",))
    assert (status, balloon.bytes) == (5, 512 * MIB)
    assert "512 MiB of 1 GiB" in out
    assert "it gives no more now" in out


@pytest.mark.parametrize("cause", ["pressure", "holder-lost"])
def test_a_guest_that_needs_its_memory_ends_it_with_5(ctl: Run, balloon: Balloon, cause: str) -> None:
    def ack(arguments: dict[str, Any]) -> dict[str, Any]:
        balloon.bytes = 8 * MIB
        balloon.agent.send_event(1, "BALLAST_BALLOON", **{"cause": cause, "total-bytes": 8 * MIB})
        return balloon.ack(arguments)

    balloon.agent.answers["ballast-balloon-ack"] = ack
    status, out, _ = ctl("balloon", "set", "256M", options=("--no-reclaim", "--json"))
    outcome = json.loads(out)
    assert (status, outcome["stopped"], outcome["total-bytes"]) == (5, "gave-way", 8 * MIB)
    assert cause in outcome["reason"]
    assert len(balloon.acked) == 1


def test_a_chunk_that_was_taken_back_before_its_ack_is_told(ctl: Run, balloon: Balloon) -> None:
    balloon.agent.answers["ballast-balloon-ack"] = Refusal("no-such-id", "it was given back")
    status, out, err = ctl("balloon", "set", "256M", options=("--no-reclaim",))
    assert status == 1
    assert "it was given back" in out
    assert "it was given back" in err


@pytest.mark.parametrize(
    ("change", "problem"),
    [({"chunk": None, "bytes": 0}, "neither that it is done"), ({"ranges": 5}, "cannot read the answer")],
)
def test_an_answer_that_would_never_end_is_told(
    ctl: Run, balloon: Balloon, change: dict[str, Any], problem: str
) -> None:
    balloon.agent.answers["ballast-balloon-inflate"] = lambda arguments: balloon.inflate(arguments) | change
    status, _, err = ctl("balloon", "set", "256M", options=("--no-reclaim",))
    assert status == 1
    assert problem in err


def test_without_qmp_it_is_refused_before_anything_is_asked(ctl: Run, agent: FakeAgent) -> None:
    for words in (("balloon", "set", "256M"), ("memory", "add", "1G"), ("memory", "remove", "1G")):
        status, out, err = ctl(*words)
        assert (status, out, agent.asked) == (4, "", [])
        assert "give --qmp PATH" in err


@pytest.mark.parametrize("more", ["", 'agent = "vsock:3"\n', 'qmp = "unix:/q"\n'])
def test_what_is_libvirts_is_not_changed_behind_its_back(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], more: str
) -> None:
    config = tmp_path / "host.toml"
    config.write_text(f'[vm.db1]\nlibvirt = "qemu:///system/db1"\n{more}')
    for words in (["balloon", "set", "256M"], ["memory", "add", "1G"], ["memory", "remove", "1G"]):
        assert main([*words, "db1", "--config", str(config), "--qmp", "/q"]) == 4
        assert "qemu:///system/db1 is libvirt's" in capfd.readouterr().err


def test_a_qemu_that_is_not_there_is_3(ctl: Run, balloon: Balloon, tmp_path: Path) -> None:
    status, out, err = ctl("balloon", "set", "256M", options=("--qmp", str(tmp_path / "absent")))
    assert (status, out, balloon.bytes) == (3, "", 0)
    assert "no QMP" in err


def test_show_tells_where_the_balloon_is(ctl: Run, balloon: Balloon) -> None:
    held = {"boot-id": "b0", "generation": 7, "total-bytes": 2 * MIB, "ranges": [[1 << 32, 2 * MIB]]}
    balloon.agent.answers["ballast-balloon-ranges"] = held
    status, out, _ = ctl("balloon", "show", options=("--json",))
    assert (status, json.loads(out)) == (0, {"target-bytes": 0, "balloon": held})
    assert "0x100000000  2 MiB" in ctl("balloon", "show")[1]


@pytest.mark.parametrize(
    ("options", "asked"),
    [
        (("1G", "--offline-timeout", "2s"), {"bytes": 1 << 30, "timeout-ms": 2000}),
        (("--block", "40", "--block", "41"), {"blocks": [40, 41], "timeout-ms": 30_000}),
        (("--dimm", "0x100000000"), {"dimm": 1 << 32, "timeout-ms": 30_000}),
    ],
)
def test_offline_asks_and_tells_what_can_be_unplugged(
    ctl: Run, agent: FakeAgent, options: tuple[str, ...], asked: dict[str, Any]
) -> None:
    block = {"phys-index": 32, "zone": "movable", "result": "done"}
    dimm = {"address": 1 << 32, "bytes": 1 << 30, "offline": True}
    agent.answers["ballast-memory-offline"] = {"bytes": 1 << 30, "blocks": [block], "dimms": [dimm]}
    status, out, _ = ctl("offline", options=options)
    assert status == 0
    assert "1 GiB taken offline" in out
    assert "0x100000000  1 GiB  yes" in out
    assert agent.asked[-1] == ("ballast-memory-offline", asked)


def test_offline_of_less_than_was_asked_is_told(ctl: Run, agent: FakeAgent) -> None:
    failed = {"phys-index": 32, "zone": "movable", "result": "failed", "reason": "EBUSY"}
    agent.answers["ballast-memory-offline"] = {"bytes": 0, "blocks": [failed], "dimms": []}
    assert ctl("offline", options=("1G",))[0] == 1
    done = failed | {"phys-index": 33, "result": "done"}
    agent.answers["ballast-memory-offline"] = {"bytes": 1 << 27, "blocks": [failed, done], "dimms": []}
    assert ctl("offline", options=("--block", "32", "--block", "33"))[0] == 5
