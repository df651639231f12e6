"""A bus of the test's own, under the real policy, and the stock client of it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pwd
import signal
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from ballast.guest.service.dbus import INTERFACE, NAME, PATH

DEADLINE_S = 10
POLICY = Path(__file__).parents[3] / "packaging/org.ballast.Agent1.conf"
_DRIVER = "org.freedesktop.DBus"
PROPERTIES = "org.freedesktop.DBus.Properties"

# What /usr/share/dbus-1/system.conf says of rights, and a place of its own.
_CONFIG = """\
<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-BUS Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig>
  <type>system</type>
  <auth>EXTERNAL</auth>
  <listen>unix:path={path}</listen>
  <policy context="default">
    <allow user="*"/>
    <deny own="*"/>
    <deny send_type="method_call"/>
    <allow send_type="signal"/>
    <allow send_requested_reply="true" send_type="method_return"/>
    <allow send_requested_reply="true" send_type="error"/>
    <allow receive_type="method_call"/>
    <allow receive_type="method_return"/>
    <allow receive_type="error"/>
    <allow receive_type="signal"/>
    <allow send_destination="org.freedesktop.DBus"/>
  </policy>
  <include>{policy}</include>
</busconfig>
"""


class PrivateBus:
    """A dbus-daemon. Whoever runs the test takes root's part in the policy."""

    def __init__(self, folder: Path, policy: str | None = None) -> None:
        """``policy`` instead of the real one. Other users reach a bus whose folder they can."""
        self.path = folder / "bus"
        me = pwd.getpwuid(os.getuid()).pw_name
        text = (policy or POLICY.read_text()).replace('user="root"', f'user="{me}"')
        (folder / "policy.conf").write_text(text)
        self._config = folder / "bus.conf"
        self._config.write_text(_CONFIG.format(path=self.path, policy=folder / "policy.conf"))
        self._daemon: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        """Start it, and again after ``stop``; it listens on return."""
        self._daemon = subprocess.Popen(
            ["dbus-daemon", f"--config-file={self._config}", "--nofork", "--nopidfile", "--print-address=1"],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        assert self._daemon.stdout is not None
        assert self._daemon.stdout.readline()

    def stop(self) -> None:
        """Kill it; connections end."""
        if self._daemon is not None:
            self._daemon.send_signal(signal.SIGKILL)
            self._daemon.communicate()
            self._daemon = None
            self.path.unlink(missing_ok=True)

    async def busctl(self, *arguments: str, user: int | None = None) -> Result:
        """Run busctl on it, as that user."""
        busctl = ["busctl", f"--address=unix:path={self.path}", "--json=short", f"--timeout={DEADLINE_S}"]
        return await _run(*_as(user), *busctl, *arguments)

    async def send(self, path: str, method: str, *arguments: str, user: int | None = None) -> Result:
        """Call a method with dbus-send, which tells the names of errors."""
        options = [f"--bus=unix:path={self.path}", "--print-reply", f"--reply-timeout={1000 * DEADLINE_S}"]
        return await _run(*_as(user), "dbus-send", *options, f"--dest={NAME}", path, method, *arguments)

    async def call(self, member: str, *arguments: str, user: int | None = None) -> Result:
        """Call a method of the agent's interface."""
        return await self.busctl("call", NAME, PATH, INTERFACE, member, *arguments, user=user)

    async def get(self, name: str, user: int | None = None) -> Any:
        """A property's value."""
        return (await self.busctl("get-property", NAME, PATH, INTERFACE, name, user=user)).data()

    async def wait_name(self, *, there: bool = True) -> None:
        """Wait until somebody owns the agent's name, or nobody does."""
        async with asyncio.timeout(DEADLINE_S):
            question = ("call", _DRIVER, "/org/freedesktop/DBus", _DRIVER, "NameHasOwner", "s", NAME)
            while (await self.busctl(*question)).data() is not there:
                pass

    @contextlib.asynccontextmanager
    async def listen(self) -> AsyncIterator[asyncio.Queue[dict[str, Any]]]:
        """What changes, in the order in which the bus brings it."""
        process = await asyncio.create_subprocess_exec(
            *("busctl", f"--address=unix:path={self.path}", "--json=short", "monitor"),
            f"--match=path={PATH}",
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        changes: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        hears = asyncio.Event()

        async def read() -> None:
            assert process.stdout is not None
            while line := await process.stdout.readline():
                hears.set()
                message = json.loads(line)
                if message.get("member") == "PropertiesChanged":
                    interface, changed, invalidated = message["payload"]["data"]
                    assert (interface, invalidated) == (INTERFACE, [])
                    changes.put_nowait({name: value["data"] for name, value in changed.items()})

        reading = asyncio.create_task(read())
        try:
            while not hears.is_set():
                await self.send(PATH, "org.freedesktop.DBus.Peer.Ping")
            yield changes
        finally:
            process.kill()
            await reading
            await process.wait()


def _as(user: int | None) -> list[str]:
    return ["setpriv", f"--reuid={user}", "--clear-groups", "--"] if user is not None else []


async def _run(*command: str) -> Result:
    process = await asyncio.create_subprocess_exec(
        *command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    async with asyncio.timeout(2 * DEADLINE_S):
        out, err = await process.communicate()
    return Result(out.decode(), err.decode())


class Result:
    """What a client said."""

    def __init__(self, out: str, err: str) -> None:
        self.out = out
        self.err = err.strip()

    def data(self) -> Any:
        """The value, or all of them if there are several."""
        assert not self.err, self.err
        data = json.loads(self.out)["data"]
        return data[0] if isinstance(data, list) and len(data) == 1 else data
