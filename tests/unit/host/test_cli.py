"""ballastctl against a fake agent: exit statuses, and what it prints for people and for programs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ballast.host.cli import main
from tests.unit.host.fake import ENDED, FILESYSTEM, FORECAST, STATUS, THAWED, FakeAgent, Refusal, begun, serve_in_thread

Run = Callable[..., tuple[int, str, str]]

VERBS = [
    *("status", "watch", "forecast", "freeze", "thaw", "online", "offline"),
    *("balloon set", "balloon show", "memory add", "memory remove", "memory explain"),
]


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[FakeAgent]:
    """Answers while ``main`` runs its own loop."""
    with serve_in_thread(tmp_path / "agent.sock") as fake:
        yield fake


@pytest.fixture
def ctl(agent: FakeAgent, capfd: pytest.CaptureFixture[str]) -> Run:
    """Run ``ballastctl VERB TARGET ...``; status, stdout and stderr."""

    def run(verb: str, *words: str) -> tuple[int, str, str]:
        try:
            status = main([*verb.split(), agent.target, *words])
        except SystemExit as exit_:
            status = int(exit_.code or 0)
        return status, *capfd.readouterr()

    return run


@pytest.mark.parametrize(
    ("verb", "words", "problem"),
    [
        ("nope", [], "invalid choice"),
        ("status", ["--timeout", "x"], "is no duration"),
        ("status", ["--", "ls"], "only freeze takes a command"),
        ("freeze", ["--"], "there is no command after --"),
        ("freeze", ["--", "/absent/command"], "no such command: /absent/command"),
        ("freeze", ["--lease", "0s"], "--lease must be 1s to 600s"),
        ("forecast", ["--lease", "0s"], "--lease must be 1s to 600s"),
        ("freeze", ["--lease", "601s"], "--lease must be 1s to 600s"),
        ("freeze", ["--max-hold", "0.5s"], "--max-hold must be 1s or more"),
        ("freeze", ["--level", "database"], "invalid choice"),
        ("watch", ["--psi", "some:1"], "'some:1'"),
        ("watch", ["--psi", "half:1:2"], "KIND is some or full"),
        ("online", ["512X"], "is no size"),
        ("online", ["512M", "--block", "3"], "not both"),
        ("online", ["--zone", "dma"], "invalid choice"),
        ("offline", [], "one of them"),
        ("offline", ["1G", "--dimm", "0x100000000"], "one of them"),
        ("offline", ["--dimm", "here"], "'here'"),
        ("balloon", [], "invalid choice"),
        ("balloon set", [], "is no size"),
        ("balloon set much", [], "is no size"),
        ("memory remove 1G", ["--offline-timeout", "x"], "is no duration"),
        ("status", ["--token-file", "/absent"], "cannot read the token"),
    ],
)
def test_wrong_usage_is_2_and_asks_nothing(
    ctl: Run, agent: FakeAgent, verb: str, words: list[str], problem: str
) -> None:
    status, out, err = ctl(verb, *words)
    assert (status, out) == (2, "")
    assert problem in err
    assert agent.asked == []


@pytest.mark.parametrize("target", ["vsock:x", "web9"])
def test_a_target_that_is_none_is_2(target: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["status", target, "--config", str(tmp_path / "absent")]) == 2
    assert target in capfd.readouterr().err


@pytest.mark.parametrize("verb", VERBS)
def test_help_has_examples(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([*verb.split(), "--help"])
    out = capsys.readouterr().out
    assert f"examples:\n  ballastctl {verb}" in out


@pytest.mark.parametrize("verb", ["status", "watch", "freeze", "thaw", "online", "balloon show"])
def test_an_agent_that_is_not_there_is_3(verb: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main([*verb.split(), f"unix:{tmp_path}/absent"]) == 3
    assert "No such file" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("refusal", "expected"),
    [
        (Refusal("unauthenticated"), 4),
        (Refusal("refused-by-policy", wire_class="CommandNotFound"), 4),
        (Refusal("frozen", wire_class="CommandNotFound"), 4),
        (Refusal("busy"), 4),
        (Refusal("stale-epoch"), 4),
        (Refusal("bad-argument"), 2),
        (Refusal("lease-expired"), 6),
        (Refusal("kernel"), 1),
        (Refusal("not-supported"), 1),
        (Refusal("no-such-id"), 1),
        (Refusal(None, wire_class="CommandNotFound"), 1),
        (Refusal(), 1),
    ],
)
@pytest.mark.parametrize("verb", ["thaw", "freeze", "online"])
def test_a_refusal_has_its_status(ctl: Run, agent: FakeAgent, verb: str, refusal: Refusal, expected: int) -> None:
    names = ("ballast-quiesce-status", "ballast-quiesce-begin", "ballast-memory-online")
    agent.answers |= dict.fromkeys(names, refusal)
    status, out, err = ctl(verb)
    assert (status, out) == (expected, "")
    assert err.startswith("ballastctl: no")


def test_a_vm_of_the_configuration_is_reached_with_its_token(
    agent: FakeAgent, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    token = tmp_path / "token"
    token.touch(0o600)
    token.write_text("s3cret\n")
    config = tmp_path / "host.toml"
    config.write_text(f'[vm.web1]\nagent = "{agent.target}"\ntoken-file = "{token}"\n')
    assert main(["status", "web1", "--config", str(config)]) == 0
    assert "agent at web1" in capfd.readouterr().out
    assert ("ballast-authenticate", {"token": "s3cret"}) in agent.asked


def test_status_shows_agent_memory_and_freeze(ctl: Run, agent: FakeAgent) -> None:
    agent.answers["ballast-quiesce-status"] = {
        "state": "frozen",
        "id": "abc",
        "lease-left-ms": 9000,
        "filesystems": [FILESYSTEM],
    }
    status, out, err = ctl("status")
    assert (status, err) == (0, "")
    words = " ".join(out.split())
    for part in ("version 0.1.0, protocol 1", "available 512 MiB (50 %)", "lease left 9 s"):
        assert part in words
    assert "/data" in out


def test_status_for_programs_has_the_names_of_the_wire(ctl: Run, agent: FakeAgent) -> None:
    status, out, _ = ctl("status", "--json")
    shown = json.loads(out)
    assert status == 0
    assert shown["agent"]["boot-id"] == "b0"
    assert shown["memory"]["blocks"]["movable-online"] == 0
    assert shown["quiesce"] == THAWED
    assert shown["errors"] == {}


def test_status_without_a_token_shows_what_it_may_and_is_partial(ctl: Run, agent: FakeAgent) -> None:
    refusal = Refusal("unauthenticated", "needs ballast-authenticate first")
    agent.answers |= {"ballast-memory-status": refusal, "ballast-quiesce-status": refusal}
    status, out, _ = ctl("status")
    assert status == 5
    assert "version" in out
    assert out.count("not shown  needs ballast-authenticate first") == 2
    status, out, _ = ctl("status", "--json")
    assert (status, json.loads(out)["memory"]) == (5, None)


def test_what_a_guest_says_cannot_steer_the_terminal(ctl: Run, agent: FakeAgent) -> None:
    agent.answers["ballast-agent-status"] = STATUS | {"version": "\x1b[31m[bold]\u202e\n9"}
    assert r"\x1b[31m[bold]\u202e\n9" in ctl("status")[1]
    agent.answers["ballast-agent-status"] = Refusal(None, "\x1b]0;title\x07")
    assert r"\x1b]0;title\x07" in ctl("status")[2]


def test_a_forecast_shows_levels_what_is_left_out_and_culprits(ctl: Run, agent: FakeAgent) -> None:
    status, out, err = ctl("forecast", "--lease", "45s", "--mountpoint", "/", "--exclude", "/mnt/*")
    assert (status, err) == (0, "")
    assert agent.asked[-1] == (
        "ballast-quiesce-forecast",
        {"lease-ms": 45_000, "mountpoints": ["/"], "exclude": ["/mnt/*"]},
    )
    assert (
        out
        == """\
would be frozen, one level after the other
  LEVEL  MOUNT POINT
  1      /mnt/loop
  2      /
  2      /data

would be left out
  MOUNT POINT  REASON
  /boot/efi    vfat cannot be frozen

may go wrong
  RISK      CULPRIT
  fanotify  scanner (812) has to permit
  of-later  x

forecast
  file systems         3
  risks                2
  to be written first  3 MiB
"""
    )
    assert json.loads(ctl("forecast", "--json")[1]) == FORECAST
    assert agent.asked[-1][1] == {"lease-ms": 30_000}


def test_a_forecast_that_could_not_look_at_something_is_5(ctl: Run, agent: FakeAgent) -> None:
    unknown = {"kind": "fanotify", "detail": "cannot tell: no answer within 5 s"}
    agent.answers["ballast-quiesce-forecast"] = FORECAST | {"order": [], "skip": [], "risks": [unknown]}
    assert ctl("forecast")[0] == 5
    agent.answers["ballast-quiesce-forecast"] = FORECAST | {"order": [], "skip": [], "risks": []}
    status, out, _ = ctl("forecast")
    assert status == 0
    assert "file systems         0\n  risks                none\n" in out


def test_freeze_without_a_command_leaves_it_held_and_names_it(ctl: Run, agent: FakeAgent) -> None:
    words = ["--lease", "45s", "--mountpoint", "/", "--mountpoint", "/var", "--exclude", "/mnt/*"]
    status, out, _ = ctl("freeze", *words, "--level", "filesystem", "--on-failure", "degrade")
    ((name, asked),) = [(name, asked) for name, asked in agent.asked if name.startswith("ballast")]
    assert name == "ballast-quiesce-begin"
    assert asked.pop("id") in out
    assert asked == {
        "lease-ms": 45_000,
        "mountpoints": ["/", "/var"],
        "exclude": ["/mnt/*"],
        "level": "filesystem",
        "on-failure": "degrade",
    }
    assert status == 0
    assert "  lease        45 s\n" in out


@pytest.mark.parametrize(
    "change",
    [
        {"consistency": "none", "filesystems": []},
        {"filesystems": [FILESYSTEM, FILESYSTEM | {"state": "failed", "reason": "EIO"}]},
        {"filesystems": [FILESYSTEM | {"state": "freezing"}]},
        {"writers": [{"name": "db", "state": "timed-out", "ms": 5}]},
    ],
)
@pytest.mark.parametrize("command", [[], ["--", "true"]])
def test_a_freeze_of_a_part_is_5(ctl: Run, agent: FakeAgent, change: dict[str, Any], command: list[str]) -> None:
    agent.answers["ballast-quiesce-begin"] = lambda arguments: begun(arguments) | change
    assert ctl("freeze", *command)[0] == 5


@pytest.mark.parametrize("command", [[], ["--", "true"]])
def test_risks_of_a_freeze_are_shown_and_are_no_failure(ctl: Run, agent: FakeAgent, command: list[str]) -> None:
    agent.answers["ballast-quiesce-begin"] = lambda arguments: begun(arguments) | {"risks": FORECAST["risks"]}
    status, out, _ = ctl("freeze", *command)
    assert status == 0
    assert "may go wrong\n  RISK      CULPRIT\n  fanotify  scanner (812) has to permit\n" in out


def test_skipped_file_systems_are_no_part_that_failed(ctl: Run, agent: FakeAgent) -> None:
    skipped = FILESYSTEM | {"state": "skipped", "reason": "vfat cannot be frozen"}
    agent.answers["ballast-quiesce-begin"] = lambda arguments: begun(arguments) | {"filesystems": [FILESYSTEM, skipped]}
    assert ctl("freeze")[0] == 0


def test_freeze_with_a_command_runs_it_inside_and_reports(ctl: Run, agent: FakeAgent) -> None:
    show = 'echo "$BALLAST_ID $BALLAST_TARGET $BALLAST_CONSISTENCY"; echo problem >&2'
    status, out, err = ctl("freeze", "--", "sh", "-c", show)
    assert status == 0
    name = agent.asked[1][1]["id"]
    assert out.startswith(f"{name} {agent.target} filesystem\n")
    assert err == "problem\n"
    for part in ("/data", "12 ms", "freeze took       20 ms", "command returned  0", "held              1.23 s"):
        assert part in out
    assert [asked for asked, _ in agent.asked[1:]] == ["ballast-quiesce-begin", "ballast-quiesce-end"]


def test_freeze_for_programs_prints_one_document(ctl: Run) -> None:
    status, out, err = ctl("freeze", "--json", "--", "echo", "hello")
    shown = json.loads(out)
    assert (status, err) == (0, "hello\n")
    assert shown["held"] is True
    assert shown["command"] == {"argv": ["echo", "hello"], "status": 0}
    assert shown["begun"]["filesystems"] == [FILESYSTEM]
    assert shown["ended"] == ENDED


@pytest.mark.parametrize(
    ("command", "returned"), [("exit 3", "3"), ("kill -9 $$", "137"), ("exec /absent/command", "127")]
)
def test_a_command_that_fails_is_1_after_the_thaw(ctl: Run, agent: FakeAgent, command: str, returned: str) -> None:
    status, out, _ = ctl("freeze", "--", "sh", "-c", command)
    assert status == 1
    assert f"command returned  {returned}" in out
    assert agent.asked[-1][0] == "ballast-quiesce-end"


def test_a_command_that_cannot_be_run_is_1_after_the_thaw(ctl: Run, agent: FakeAgent, tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text("#!/absent/interpreter\n")
    script.chmod(0o700)
    status, _, err = ctl("freeze", "--", str(script))
    assert status == 1
    assert "No such file" in err
    assert agent.asked[-1][0] == "ballast-quiesce-end"


@pytest.mark.parametrize(
    "answer",
    [ENDED | {"held": False, "reason": "lease-expired"}, Refusal("no-such-id"), Refusal(), {"from": "the future"}],
)
def test_a_freeze_that_did_not_hold_is_6(ctl: Run, agent: FakeAgent, answer: Any) -> None:
    agent.answers["ballast-quiesce-end"] = answer
    status, out, _ = ctl("freeze", "--", "true")
    assert status == 6
    assert "did not hold" in out
    assert ctl("freeze", "--", "false")[0] == 1
    status, out, _ = ctl("freeze", "--json", "--", "true")
    assert (status, json.loads(out)["held"]) == (6, False)


def test_thaw_ends_the_freeze_that_there_is(ctl: Run, agent: FakeAgent) -> None:
    agent.answers["ballast-quiesce-status"] = {"state": "frozen", "id": "abc", "filesystems": []}
    status, out, _ = ctl("thaw")
    assert status == 0
    assert "held       1.23 s" in out
    assert agent.asked[-1] == ("ballast-quiesce-end", {"id": "abc"})


def test_thaw_of_an_id_asks_for_no_status(ctl: Run, agent: FakeAgent) -> None:
    agent.answers["ballast-quiesce-end"] = ENDED | {"held": False, "reason": "lease-expired"}
    status, out, _ = ctl("thaw", "--id", "abc", "--json")
    assert (status, json.loads(out)["reason"]) == (6, "lease-expired")
    assert [name for name, _ in agent.asked[1:]] == ["ballast-quiesce-end"]


def test_thaw_of_nothing_is_6(ctl: Run) -> None:
    """Whoever froze and comes to thaw must not take its snapshot for a consistent one."""
    status, out, err = ctl("thaw")
    assert (status, out) == (6, "")
    assert "nothing is frozen" in err


BLOCK = {"phys-index": 9, "zone": "movable", "result": "done", "online-us": 5000}


@pytest.mark.parametrize(
    ("words", "asked", "blocks", "expected"),
    [
        ([], {}, [BLOCK], 0),
        ([], {}, [], 0),
        (["128M"], {"bytes": 128 << 20}, [BLOCK], 0),
        (["256M"], {"bytes": 256 << 20}, [BLOCK], 5),
        (["256M"], {"bytes": 256 << 20}, [], 1),
        (["--block", "9", "--block", "8"], {"blocks": [9, 8]}, [BLOCK, BLOCK | {"result": "already"}], 0),
        (["--zone", "kernel"], {"zone": "kernel"}, [BLOCK, BLOCK | {"result": "failed", "reason": "EIO"}], 5),
        ([], {}, [BLOCK | {"result": "failed"}], 1),
    ],
)
def test_online(
    ctl: Run, agent: FakeAgent, words: list[str], asked: dict[str, Any], blocks: list[Any], expected: int
) -> None:
    size_bytes = sum(128 << 20 for block in blocks if block["result"] == "done")
    agent.answers["ballast-memory-online"] = {"bytes": size_bytes, "blocks": blocks}
    status, out, _ = ctl("online", *words)
    assert status == expected
    assert agent.asked[-1] == ("ballast-memory-online", asked)
    assert "brought online" in out
    assert ctl("online", *words, "--json")[0] == expected
