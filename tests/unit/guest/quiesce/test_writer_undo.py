"""packaging/scripts/ballast-writer-undo, where the agent has hung up on a writer that is done."""

from __future__ import annotations

import socket
import subprocess
from pathlib import Path

UNDO = Path(__file__).parents[4] / "packaging/scripts/ballast-writer-undo"


def test_one_that_is_undone_ends_without_a_word_in_the_journal(tmp_path: Path) -> None:
    agents, writers = socket.socketpair()
    agents.close()
    with writers:
        ended = subprocess.run(
            [str(UNDO), str(tmp_path / "no-marker"), "/bin/false"],
            stdin=writers.fileno(),
            stdout=writers.fileno(),
            stderr=subprocess.PIPE,
            check=False,
            restore_signals=False,  # systemd ignores SIGPIPE for services, as Python does
            timeout=10,
        )
    assert (ended.returncode, ended.stderr) == (0, b"")
