"""Scripts of Azure's VM backup: what its configuration says of them, and who may read it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.unit.guest.writers.hook_session import Guest, Session

CONFIG = "etc/azure/VMSnapshotScriptPluginConfig.json"
# As the repository MicrosoftAzureBackup/VMSnapshotPluginConfig has it.
TEMPLATE: dict[str, Any] = {
    "pluginName": "ScriptRunner",
    "preScriptLocation": "",
    "postScriptLocation": "",
    "preScriptParams": ["", ""],
    "postScriptParams": ["", ""],
    "preScriptNoOfRetries": 0,
    "postScriptNoOfRetries": 0,
    "timeoutInSeconds": 30,
    "continueBackupOnFailure": True,
    "fsFreezeEnabled": True,
    "ScriptsExecutionPollTimeSeconds": 3,
}
PHASE_MS = 33_334  # 30 s, and the tenth that is the answer's


class Azure(Guest):
    """A guest with both scripts, which log their first parameter, and then do ``before`` or ``after``."""

    def configure(self, *, before: str = "", after: str = "", mode: int = 0o600, **settings: Any) -> Path:
        """Its configuration, with other ``settings``."""
        self.hook("opt/pre.sh", before, 0o700)
        self.hook("opt/post.sh", after, 0o700)
        ours = {"preScriptLocation": "/opt/pre.sh", "postScriptLocation": "/opt/post.sh", "preScriptParams": ["x y"]}
        return self.write(CONFIG, json.dumps(TEMPLATE | ours | settings), mode)


@pytest.fixture
def guest(tmp_path: Path) -> Azure:
    return Azure(tmp_path)


@pytest.fixture
def session(guest: Azure) -> Iterator[Session]:
    with Session(guest, "azure_scripts:AzureScripts") as session:
        yield session


def test_scripts_run_with_their_parameters(guest: Azure, session: Session) -> None:
    guest.configure()
    phases = {"freeze-ms": PHASE_MS, "thaw-ms": PHASE_MS}
    assert session.ask("identify") == {"level": "front-end", "critical": False, **phases}
    assert session.ask("prepare") == {}
    assert session.ask("freeze") == {"detail": {"hooks": ["/opt/pre.sh"]}}
    assert session.ask("thaw") == {"held": True}
    assert guest.told == ["pre.sh x y", "post.sh "]
    assert "x y" not in session.journal()


def test_a_freeze_that_failed_is_followed_by_the_script_after(guest: Azure, session: Session) -> None:
    guest.configure(before="exit 1")
    session.begin()
    assert session.ask("freeze")["error"] == f"{guest.root}/opt/pre.sh exited 1"
    assert session.ask("abort") == {}
    assert guest.told == ["pre.sh x y", "post.sh "]


def test_a_script_is_tried_again_as_often_as_it_says(guest: Azure, session: Session) -> None:
    guest.configure(before=f'[ "$(grep -c pre {guest.log})" = 3 ]', preScriptNoOfRetries=2)
    session.begin()
    assert "error" not in session.ask("freeze")
    assert guest.told == ["pre.sh x y"] * 3


def test_all_tries_together_have_the_time_that_it_says(guest: Azure, session: Session) -> None:
    guest.configure(before="sleep 1000", preScriptNoOfRetries=5, timeoutInSeconds=1)
    session.begin()
    assert session.ask("freeze")["error"].startswith(f"{guest.root}/opt/pre.sh did not end within 1.")
    assert guest.told == ["pre.sh x y"]


def test_a_warning_is_no_failure(guest: Azure, session: Session) -> None:
    guest.configure(before="exit 2", after="exit 2", continueBackupOnFailure=False)
    session.begin()
    assert "error" not in session.ask("freeze")
    assert session.ask("thaw") == {"held": True}


@pytest.mark.parametrize("may_go_on", [True, False])
def test_whether_a_failure_matters_the_configuration_says(guest: Azure, session: Session, may_go_on: bool) -> None:
    guest.configure(after="exit 1", continueBackupOnFailure=may_go_on)
    assert session.ask("identify")["critical"] is not may_go_on
    session.ask("prepare")
    session.ask("freeze")
    assert session.ask("thaw") == {"held": may_go_on, "reason": f"{guest.root}/opt/post.sh exited 1"}


@pytest.mark.parametrize("file", [CONFIG, "opt/pre.sh", "opt/post.sh"])
def test_what_others_may_read_is_refused_by_name(guest: Azure, session: Session, file: str) -> None:
    guest.configure()
    guest.root.joinpath(file).chmod(0o750)
    session.ask("identify")
    assert session.ask("prepare")["error"].startswith(f"{guest.root / file} is not used: ")


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"timeoutInSeconds": "30"}, "timeoutInSeconds"),
        ({"preScriptParams": "x"}, "preScriptParams"),
        ({"continueBackupOnFailure": 1}, "continueBackupOnFailure"),
        ({"preScriptNoOfRetries": None}, "preScriptNoOfRetries"),
        ({"preScriptLocation": "opt/pre.sh"}, "no absolute path"),
        ({"postScriptLocation": ""}, "names only one"),
        ({"postScriptLocation": "/opt/none.sh"}, "No such file"),
    ],
)
def test_a_setting_that_is_wrong_is_named(guest: Azure, session: Session, settings: dict[str, Any], part: str) -> None:
    guest.configure(**settings)
    assert "error" not in session.ask("identify")
    assert part in session.ask("prepare")["error"]


@pytest.mark.parametrize("text", ["", "[]", "{"])
def test_a_configuration_that_cannot_be_read_is_not_critical(guest: Azure, session: Session, text: str) -> None:
    guest.write(CONFIG, text, 0o600)
    assert session.ask("identify")["critical"] is False
    assert CONFIG in session.ask("prepare")["error"]


def test_who_freezes_is_not_for_the_configuration_to_say(guest: Azure, session: Session) -> None:
    guest.configure(fsFreezeEnabled=False)
    session.begin()
    assert "fsFreezeEnabled is the host's affair" in session.journal()


def test_the_template_as_it_comes_is_nothing_to_do(guest: Azure, session: Session) -> None:
    assert "no " in session.ask("identify")["absent"]
    guest.write(CONFIG, json.dumps(TEMPLATE), 0o600)
    assert session.ask("identify") == {"absent": "no hooks"}
