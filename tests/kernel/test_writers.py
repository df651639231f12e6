"""Writers: each that is asked to prepare gets one thaw or one abort, whatever it does."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ballast.guest.quiesce.session import Quiesce
from ballast.guest.quiesce.writer import Writer
from ballast.guest.quiesce.writer_process import WriterProcess
from ballast.wire.errors import DeadlineExceeded, WriterRefused
from ballast.wire.names import QuiesceBegun, QuiesceEnded
from tests.kernel.conftest import LoopFs, MakeLoopFs
from tests.kernel.fake_systemd import FakeSystemd, write_program

HELD = ["identify", "prepare", "freeze", "thaw", "post"]
CRITICAL = '{"critical": true, "freeze-ms": 500, "thaw-ms": 1000}'
LAX = '{"freeze-ms": 500, "thaw-ms": 1000}'


@pytest.fixture
def systemd(tmp_path: Path) -> Iterator[FakeSystemd]:
    fake = FakeSystemd(tmp_path / "systemd")
    yield fake
    fake.join()


@pytest.fixture
def ext4(make_loop_fs: MakeLoopFs) -> LoopFs:
    return make_loop_fs()


class Scene:
    """Writers, a file system, and what was said to whom."""

    def __init__(self, tmp_path: Path, systemd: FakeSystemd) -> None:
        self.log = tmp_path / "log"
        self.log.touch()
        self.markers = tmp_path / "markers"
        self._folder = tmp_path / "writers.d"
        self._folder.mkdir()
        self._systemd = systemd
        self.programs: list[Path] = []

    def add(self, name: str, identify: str = "{}", **actions: str) -> None:
        self.programs.append(write_program(self._folder, name, self.log, actions, identify))

    def find(self) -> list[Writer]:
        return [
            WriterProcess(p, markers=self.markers, cgroups=self._systemd.cgroups, start=self._systemd.start)
            for p in self.programs
        ]

    def told(self, name: str) -> list[str]:
        """The verbs that one was told."""
        return [line.split()[1] for line in self.log.read_text().splitlines() if line.split()[0] == name]

    async def until_told(self, name: str, verb: str) -> None:
        """Wait until one was told a verb."""
        deadline_s = time.monotonic() + 10
        while verb not in self.told(name):
            assert time.monotonic() < deadline_s
            await asyncio.sleep(0.01)

    def order(self, verb: str) -> list[str]:
        """Who was told a verb, in order."""
        return [line.split()[0] for line in self.log.read_text().splitlines() if line.split()[1] == verb]


@pytest.fixture
def scene(tmp_path: Path, systemd: FakeSystemd) -> Scene:
    return Scene(tmp_path, systemd)


async def round_trip(quiesce: Quiesce, **arguments: Any) -> tuple[QuiesceBegun, QuiesceEnded]:
    session_id = str(uuid.uuid4())
    begun = await quiesce.begin(session_id, 20_000, **arguments)
    return begun, await quiesce.end(session_id)


async def settle(quiesce: Quiesce) -> None:
    """Wait until the session is over for its writers too."""
    async with asyncio.timeout(20):
        await quiesce._idle.wait()


MakeQuiesce = Callable[..., Quiesce]


async def test_a_writer_is_undone_once_also_if_what_should_undo_it_is_killed_with_it(
    scene: Scene, systemd: FakeSystemd, make_quiesce: MakeQuiesce, ext4: LoopFs
) -> None:
    systemd.is_killing_too_much = True
    scene.add("app", LAX, freeze="sleep 60")
    quiesce = make_quiesce(ext4, find_writers=scene.find)
    begun, _ = await round_trip(quiesce)
    await settle(quiesce)
    assert [one.state for one in begun.writers] == ["timed-out"]
    assert scene.told("app")[1:] == ["prepare", "freeze", "abort"]
    assert list(scene.markers.iterdir()) == []


async def test_a_writer_hears_everything_once_and_in_order(
    scene: Scene, make_quiesce: MakeQuiesce, ext4: LoopFs
) -> None:
    scene.add("app", freeze="""echo '{"detail": {"position": "0/42"}}'""")
    quiesce = make_quiesce(ext4, find_writers=scene.find)
    begun, ended = await round_trip(quiesce)
    await settle(quiesce)
    assert begun.consistency == "application"
    assert [(one.name, one.state, one.detail) for one in begun.writers] == [("app", "frozen", {"position": "0/42"})]
    assert ended.held
    assert [one.state for one in ended.writers] == ["thawed"]
    assert scene.told("app") == HELD
    assert list(scene.markers.iterdir()) == []


async def test_front_ends_are_frozen_first_and_thawed_last(
    scene: Scene, make_quiesce: MakeQuiesce, ext4: LoopFs
) -> None:
    scene.add("a-disk", '{"level": "system"}')
    scene.add("b-base", '{"level": "back-end"}')
    scene.add("c-shop", '{"level": "front-end"}')
    await round_trip(quiesce := make_quiesce(ext4, find_writers=scene.find))
    await settle(quiesce)
    assert scene.order("freeze") == ["c-shop", "b-base", "a-disk"]
    assert scene.order("thaw") == ["a-disk", "b-base", "c-shop"]


@pytest.mark.parametrize(
    ("actions", "told", "state"),
    [
        pytest.param({"freeze": """echo '{"error": "no"}'"""}, ["prepare", "freeze", "abort"], "failed", id="refuses"),
        pytest.param({"prepare": "exit 1"}, ["prepare", "abort"], "failed", id="exits-in-prepare"),
        pytest.param({"freeze": "exit 1"}, ["prepare", "freeze", "abort"], "failed", id="exits-in-freeze"),
        pytest.param({"freeze": "sleep 60"}, ["prepare", "freeze", "abort"], "timed-out", id="hangs"),
        pytest.param(
            {"freeze": "sleep 60 & exit 1"},
            ["prepare", "freeze", "abort"],
            "failed",
            id="leaves-a-child-with-its-stdout",
        ),
        pytest.param(
            {"freeze": "trap '' TERM HUP; sleep 60 & sleep 61"},
            ["prepare", "freeze", "abort"],
            "timed-out",
            id="defies",
        ),
        pytest.param({"freeze": "echo what"}, ["prepare", "freeze", "abort"], "failed", id="answers-nonsense"),
        pytest.param({"freeze": "echo []"}, ["prepare", "freeze", "abort"], "failed", id="answers-no-object"),
    ],
)
@pytest.mark.parametrize("critical", [True, False])
async def test_a_writer_that_fails_is_undone_once(
    scene: Scene,
    make_quiesce: MakeQuiesce,
    ext4: LoopFs,
    actions: dict[str, str],
    told: list[str],
    state: str,
    critical: bool,
) -> None:
    scene.add("bad", CRITICAL if critical else LAX, **actions)
    scene.add("good")
    quiesce = make_quiesce(ext4, find_writers=scene.find)
    if critical:
        with pytest.raises(DeadlineExceeded if state == "timed-out" else WriterRefused, match="writer bad") as caught:
            await round_trip(quiesce)
        results = {one["name"]: one["state"] for one in caught.value.data["writers"]}
        assert results["bad"] == state
        assert not quiesce.is_frozen
    else:
        begun, ended = await round_trip(quiesce)
        assert begun.consistency == "filesystem"
        assert {one.name: one.state for one in begun.writers} == {"bad": state, "good": "frozen"}
        assert ended.held
    await settle(quiesce)
    assert scene.told("bad") == ["identify", *told]
    assert [verb for verb in scene.told("good") if verb in ("thaw", "abort")] == ["abort" if critical else "thaw"]
    assert list(scene.markers.iterdir()) == []


async def test_a_writer_that_dies_frozen_is_lost_and_undone(
    scene: Scene, make_quiesce: MakeQuiesce, ext4: LoopFs
) -> None:
    scene.add("app", freeze="echo '{}'; exit 3")
    begun, ended = await round_trip(quiesce := make_quiesce(ext4, find_writers=scene.find))
    await settle(quiesce)
    assert begun.consistency == "application"
    assert (ended.held, ended.reason) == (False, "writer-lost")
    assert [(one.state, one.reason) for one in ended.writers] == [("lost", "it has ended: exited 3")]
    assert scene.told("app") == ["identify", "prepare", "freeze", "abort"]


async def test_a_writer_whose_session_broke_says_so(scene: Scene, make_quiesce: MakeQuiesce, ext4: LoopFs) -> None:
    scene.add("app", thaw="""echo '{"held": false, "reason": "the server was restarted"}'""")
    _, ended = await round_trip(quiesce := make_quiesce(ext4, find_writers=scene.find))
    await settle(quiesce)
    assert (ended.held, ended.reason) == (False, "writer-lost")
    assert [one.reason for one in ended.writers] == ["the server was restarted"]
    assert scene.told("app") == HELD


async def test_who_asks_for_another_try_gets_it(scene: Scene, make_quiesce: MakeQuiesce, ext4: LoopFs) -> None:
    scene.add(
        "app",
        freeze="""[ -e $RUNTIME_DIRECTORY/again ] && echo '{}' || { : >$RUNTIME_DIRECTORY/again;
            echo '{"error": "busy", "retryable": true}'; }""",
    )
    begun, _ = await round_trip(quiesce := make_quiesce(ext4, find_writers=scene.find))
    await settle(quiesce)
    assert begun.consistency == "application"
    assert scene.told("app") == ["identify", "prepare", "freeze", "freeze", "thaw", "post"]


async def test_nothing_frozen_is_undone_all_the_same(scene: Scene, make_quiesce: MakeQuiesce, ext4: LoopFs) -> None:
    scene.add("app")
    _, _ = await round_trip(quiesce := make_quiesce(ext4, find_writers=scene.find), exclude=["*"])
    await settle(quiesce)
    assert scene.told("app") == HELD


async def test_an_end_that_comes_first_calls_off_what_writers_prepare(
    scene: Scene, make_quiesce: MakeQuiesce, ext4: LoopFs
) -> None:
    scene.add("app", prepare="sleep 30; echo '{}'")
    quiesce = make_quiesce(ext4, find_writers=scene.find)
    beginning = asyncio.create_task(quiesce.begin("one", 20_000))
    await scene.until_told("app", "prepare")
    with pytest.raises(Exception, match="ended before it was frozen"):
        await quiesce.end("one")
    with pytest.raises(Exception, match="ended before it was frozen"):
        await beginning
    await settle(quiesce)
    assert scene.told("app") == ["identify", "prepare", "abort"]


async def test_a_writer_that_wants_to_be_somebody_else_is_started_anew(
    scene: Scene, make_quiesce: MakeQuiesce, ext4: LoopFs, systemd: FakeSystemd
) -> None:
    scene.add("app", '{"user": "nobody"}')
    await round_trip(quiesce := make_quiesce(ext4, find_writers=scene.find))
    await settle(quiesce)
    assert systemd.started == [("ballast-writer-app.service", "root"), ("ballast-writer-app.service", "nobody")]
    assert scene.told("app") == ["identify", *HELD]


@pytest.mark.parametrize(
    ("spoil", "state", "reason"),
    [
        pytest.param(lambda p: p.chmod(0o777), "failed", "others than root may write", id="writable"),
        pytest.param(lambda p: p.chmod(0o644), "failed", "is no executable file", id="not-executable"),
        pytest.param(
            lambda p: p.write_text("#!/bin/sh\n# ballast-needs: /no/such /no/other*\n"),
            "absent",
            "no /no/such or /no/other*",
            id="not-needed",
        ),
    ],
)
async def test_a_program_that_must_not_or_need_not_run_is_not_run(
    scene: Scene,
    make_quiesce: MakeQuiesce,
    ext4: LoopFs,
    systemd: FakeSystemd,
    spoil: Callable[[Path], Any],
    state: str,
    reason: str,
) -> None:
    scene.add("app")
    spoil(scene.programs[0])
    begun, ended = await round_trip(make_quiesce(ext4, find_writers=scene.find))
    assert ended.held
    (result,) = begun.writers
    assert result.state == state
    assert reason in str(result.reason)
    assert systemd.started == []
