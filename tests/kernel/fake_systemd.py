"""What a writer's unit is to systemd, in a few lines: start, wait, run ExecStopPost= on the same streams, be gone.

The programs and the script that undoes them are the real ones; cgroup.procs names the program that runs.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import threading
from pathlib import Path
from typing import Any

from ballast.guest.bus import BusError, Variant

UNDO = Path(__file__).parents[2] / "packaging/scripts/ballast-writer-undo"


class FakeSystemd:
    """``start`` is what WriterProcess takes for ``start_unit``; ``cgroups`` is the folder it looks for cgroups in."""

    def __init__(self, folder: Path) -> None:
        self.cgroups = folder / "ballast.slice"
        self.runtime = folder / "run"
        self.started: list[tuple[str, str]] = []
        self.is_killing_too_much = False  # whatever ends a writer ends its ExecStopPost= too
        self._threads: list[threading.Thread] = []

    async def start(self, name: str, properties: dict[str, Variant], stdio_fd: int) -> None:
        cgroup = self.cgroups / name
        if cgroup.exists():
            raise BusError("org.freedesktop.systemd1.UnitExists")
        cgroup.mkdir(parents=True)
        (cgroup / "cgroup.procs").touch()
        self.started.append((name, properties["User"].value if "User" in properties else "root"))
        fd = os.dup(stdio_fd)
        self._threads.append(threading.Thread(target=self._run, args=(cgroup, properties, fd), daemon=True))
        self._threads[-1].start()

    def join(self) -> None:
        """Wait until every unit is gone."""
        for thread in self._threads:
            thread.join(20)
            assert not thread.is_alive(), "a unit is still running"

    def _run(self, cgroup: Path, properties: dict[str, Variant], fd: int) -> None:
        runtime = self.runtime / properties["RuntimeDirectory"].value[0]
        runtime.mkdir(parents=True, exist_ok=True)
        environment = {"PATH": os.environ["PATH"], "RUNTIME_DIRECTORY": str(runtime)}
        try:
            (start,) = properties["ExecStart"].value
            status = self._run_one(_real(start[1]), environment, fd, cgroup)
            environment |= {"EXIT_CODE": "killed" if status < 0 else "exited", "EXIT_STATUS": str(abs(status))}
            if "ExecStopPost" in properties and not self.is_killing_too_much:
                (stop,) = properties["ExecStopPost"].value
                self._run_one(_real(stop[1]), environment, fd, cgroup)
        finally:
            os.close(fd)
            (cgroup / "cgroup.procs").unlink()
            cgroup.rmdir()

    def _run_one(self, command: list[str], environment: dict[str, str], fd: int, cgroup: Path) -> int:
        """Run in a process group of its own, of which nothing is left at the end."""
        process: subprocess.Popen[Any] = subprocess.Popen(
            command, stdin=fd, stdout=fd, env=environment, start_new_session=True
        )
        (cgroup / "cgroup.procs").write_text(f"{process.pid}\n")
        status = process.wait()
        (cgroup / "cgroup.procs").write_text("")
        _kill_group(process.pid)
        return status


def _real(command: list[str]) -> list[str]:
    """The script that undoes is where it is in the tree."""
    return ["/bin/sh", str(UNDO), *command[1:]] if Path(command[0]).name == UNDO.name else command


def _kill_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def write_program(
    folder: Path, name: str, log: Path, actions: dict[str, str] | None = None, identify: str = "{}"
) -> Path:
    """A writer in shell: it notes each verb in ``log``, and does what ``actions`` says instead of answering ``{}``."""
    cases = {"identify": f"echo {shlex.quote(identify)}"} | (actions or {})
    lines = "\n".join(f"    {verb}) {action} ;;" for verb, action in cases.items())
    program = folder / name
    program.write_text(f"""#!/bin/sh
while read -r request; do
    verb=${{request#*'"verb": "'}}
    verb=${{verb%%'"'*}}
    echo "{name} $verb" >>{log}
    case $verb in
{lines}
    *) echo '{{}}' ;;
    esac
done
""")
    program.chmod(0o755)
    return program
