"""Units to stop or to signal: what ran runs again, nothing else, whatever becomes of the writer."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.unit.guest.writers.hook_session import Guest, Session

# As systemctl(1) behaves towards us; a unit is a file with its properties.
_SYSTEMCTL = """#!{python} -ISB
import json, sys
from pathlib import Path
units, log = Path({units!r}), Path({log!r})
words = [word for word in sys.argv[1:] if word not in ("--", "--no-ask-password")]
verb, options, names = words[0], [w for w in words[1:] if w.startswith("-")], [w for w in words[1:] if w[0] != "-"]
if verb != "show":
    with log.open("a") as file:
        print(verb, *(option.partition("=")[2] for option in options), *names, file=file)
for name in names:
    path = units / name
    unit = json.loads(path.read_text()) if path.exists() else {{"LoadState": "not-found", "ActiveState": "inactive"}}
    if verb == "show":
        print("Id=" + name, "InvocationID=" + unit.pop("InvocationID", ""), *map("=".join, unit.items()), "", sep="\\n")
        continue
    if "Trouble" in unit:
        sys.exit(f"Job for {{name}} failed: {{unit['Trouble']}}")
    unit["ActiveState"] = {{"stop": "inactive", "start": "active"}}.get(verb, unit["ActiveState"])
    path.write_text(json.dumps(unit))
"""


class Systemd(Guest):
    """Units, and what systemctl was asked."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.folder = folder / "units"
        self.folder.mkdir()
        text = _SYSTEMCTL.format(python=sys.executable, units=str(self.folder), log=str(self.log))
        self.root = self.write("systemctl", text, 0o755)

    def unit(self, name: str, state: str = "active", **properties: str) -> None:
        """A unit, new or as it is now."""
        unit = {"LoadState": "loaded", "ActiveState": state, "InvocationID": f"1-{name}", **properties}
        self.folder.joinpath(name).write_text(json.dumps(unit))


@pytest.fixture
def systemd(tmp_path: Path) -> Systemd:
    return Systemd(tmp_path)


@pytest.fixture
def session(systemd: Systemd) -> Iterator[Session]:
    with Session(systemd, "units:Units") as session:
        yield session


def begin(session: Session, **config: Any) -> Any:
    assert session.ask("identify", config=config)["level"] == "front-end"
    return session.ask("prepare")


def test_what_ran_is_stopped_and_started_again(systemd: Systemd, session: Session) -> None:
    systemd.unit("app.service")
    systemd.unit("idle.service", "inactive")
    systemd.unit("broken.service", "failed")
    assert begin(session, stop=["app.service", "idle.service", "broken.service"]) == {}
    assert systemd.told == []
    assert session.ask("freeze") == {"detail": {"stopped": ["app.service"], "signalled": []}}
    assert session.ask("thaw") == {"held": True}
    assert systemd.told == ["stop app.service", "start app.service"]


def test_what_a_stop_takes_along_is_started_again_too(systemd: Systemd, session: Session) -> None:
    systemd.unit("db.service", RequiredBy="app.service idle.service", BoundBy="")
    systemd.unit("app.service", ConsistsOf="worker.service")
    systemd.unit("worker.service", RequiredBy="db.service")
    systemd.unit("idle.service", "inactive", ConsistsOf="other.service")
    systemd.unit("other.service")
    begin(session, stop=["db.service"])
    session.ask("freeze")
    session.ask("abort")
    assert systemd.told == [f"{verb} db.service app.service worker.service" for verb in ("stop", "start")]


def test_the_main_process_is_signalled_and_again_at_the_end(systemd: Systemd, session: Session) -> None:
    systemd.unit("queue.service")
    systemd.unit("cache.service")
    systemd.unit("idle.service", "inactive")
    signals = {"queue.service": "SIGUSR1/SIGUSR2", "cache.service": "SIGHUP", "idle.service": "SIGHUP"}
    assert begin(session, signal=signals) == {}
    assert session.ask("freeze") == {"detail": {"stopped": [], "signalled": ["queue.service", "cache.service"]}}
    assert session.ask("thaw") == {"held": True}
    assert systemd.told == [
        "kill main SIGUSR1 queue.service",
        "kill main SIGHUP cache.service",
        "kill main SIGUSR2 queue.service",
    ]


@pytest.mark.parametrize("now", [{"state": "active", "InvocationID": "2"}, {"state": "failed"}])
def test_another_process_gets_no_signal_and_the_freeze_did_not_hold(
    systemd: Systemd, session: Session, now: dict[str, str]
) -> None:
    systemd.unit("queue.service")
    begin(session, signal={"queue.service": "SIGUSR1/SIGUSR2"})
    session.ask("freeze")
    systemd.unit("queue.service", **now)
    assert session.ask("thaw") == {"held": False, "reason": "queue.service ended or was restarted"}
    assert systemd.told == ["kill main SIGUSR1 queue.service"]


def test_a_unit_that_somebody_started_did_not_hold(systemd: Systemd, session: Session) -> None:
    systemd.unit("app.service")
    begin(session, stop=["app.service"])
    session.ask("freeze")
    systemd.unit("app.service")
    assert session.ask("thaw") == {"held": False, "reason": "app.service was started"}


def test_a_unit_that_does_not_start_again_is_told_of(systemd: Systemd, session: Session) -> None:
    systemd.unit("app.service")
    begin(session, stop=["app.service"])
    session.ask("freeze")
    systemd.unit("app.service", "inactive", Trouble="timeout")
    reason = "systemctl start app.service exited 1: Job for app.service failed: timeout"
    assert session.ask("thaw") == {"held": True, "reason": reason}


def test_a_unit_that_does_not_stop_fails_the_freeze_and_is_started_all_the_same(
    systemd: Systemd, session: Session
) -> None:
    systemd.unit("app.service", Trouble="timeout")
    begin(session, stop=["app.service"])
    assert "Job for app.service failed: timeout" in session.ask("freeze")["error"]
    systemd.unit("app.service", "deactivating")
    assert session.ask("abort") == {}
    assert systemd.told == ["stop app.service", "start app.service"]


def test_a_writer_that_was_killed_is_undone_by_the_next_once(systemd: Systemd, session: Session) -> None:
    systemd.unit("app.service")
    systemd.unit("queue.service")
    begin(session, stop=["app.service"], signal={"queue.service": "SIGUSR1/SIGUSR2"})
    session.ask("freeze")
    session.kill()
    for _ in range(2):
        with Session(systemd, "units:Units") as heir:
            assert heir.ask("abort") == {}
    assert systemd.told[2:] == ["kill main SIGUSR2 queue.service", "start app.service"]


def test_an_abort_before_the_freeze_does_nothing(systemd: Systemd, session: Session) -> None:
    systemd.unit("app.service")
    begin(session, stop=["app.service"])
    assert session.ask("abort") == {}
    assert systemd.told == []


def test_it_does_not_stop_who_started_it(systemd: Systemd, session: Session) -> None:
    systemd.unit("dbus.service", RequiredBy="ballast-agent.service")
    systemd.unit("ballast-agent.service")
    assert begin(session, stop=["dbus.service"])["error"] == "this would stop ballast-agent.service"


@pytest.mark.parametrize(
    ("config", "part"),
    [
        ({"stop": "app.service"}, "stop is a list"),
        ({"stop": [1]}, "stop is a list"),
        ({"stop": ["none.service"]}, "none.service is not-found"),
        ({"signal": {"none.service": "SIGHUP"}}, "none.service is not-found"),
        ({"signal": ["app.service"]}, "signal is a table"),
        ({"signal": {"app.service": "HUP"}}, "signal for app.service is"),
        ({"signal": {"app.service": "SIGUSR1/"}}, "signal for app.service is"),
        ({"signal": {"app.service": "SIGUSR1/SIGUSR2/SIGHUP"}}, "signal for app.service is"),
        ({"signal": {"app.service": 10}}, "signal for app.service is"),
    ],
)
def test_a_setting_that_is_wrong_is_named(
    systemd: Systemd, session: Session, config: dict[str, Any], part: str
) -> None:
    systemd.unit("app.service")
    assert part in begin(session, **config)["error"]


@pytest.mark.parametrize("config", [{}, {"stop": [], "signal": {}}, {"enabled": True}])
def test_without_units_there_is_nothing_to_do(session: Session, config: dict[str, Any]) -> None:
    assert session.ask("identify", config=config) == {"absent": "[writer.units] names no units"}
