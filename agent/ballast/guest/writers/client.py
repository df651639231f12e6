"""A database's own client program as a session: statements go in on a pipe, rows come out, errors end it.

The program is told to end at its first error and never to connect again. So a session that answers is the one that was
begun, with all its locks, and one that was lost with its server says so.
"""

from __future__ import annotations

import contextlib
import os
import select
import subprocess

from ballast.guest.writers.program import WriterError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ballast.guest.writers.program import Request

_END = "ballast-end"
_OUTPUT_LIMIT_BYTES = 1 << 16
_KILLED_S = 5.0


class Client:
    """One session, from the start of the program to its end."""

    def __init__(self, command: Sequence[str], mark: str, environment: Mapping[str, str] | None = None) -> None:
        """``mark`` is the statement by which the program writes a line with whatever stands for its ``{}``. OSError."""
        self._mark = mark.format(_END)
        self._said = ""
        self._child = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,  # where it says why it ends
            env=os.environ | dict(environment or {}),
        )

    def ask(self, request: Request, statements: str) -> list[str]:
        """Have the statements executed; their rows, a line each. WriterError if one fails, or at the deadline.

        Either way the session is over then, and with it whatever it had locked.
        """
        assert self._child.stdin is not None
        if self._child.stdin.closed:
            raise WriterError("the session with the server has ended")
        with contextlib.suppress(OSError):  # if it has ended, what it said is still to be read
            self._child.stdin.write(f"{statements}\n{self._mark}\n".encode())
            self._child.stdin.flush()
        self._said = ""
        while not self._said.endswith(f"{_END}\n"):
            self._read_more(request)
        return self._said.splitlines()[:-1]

    def _read_more(self, request: Request) -> None:
        assert self._child.stdout is not None
        fd = self._child.stdout.fileno()
        if not select.select([fd], [], [], request.left_s())[0]:
            self.close()
            raise WriterError(f"the server did not answer {request.verb} in time")
        data = os.read(fd, _OUTPUT_LIMIT_BYTES)
        self._said += data.decode(errors="replace")
        if not data or len(self._said) > _OUTPUT_LIMIT_BYTES:
            self.close()
            raise WriterError(" ".join(self._said[-1000:].split()) or "the session with the server has ended")

    def close(self) -> None:
        """End the session at once: the server sees a client that is gone, and takes back what it did not commit."""
        self._child.kill()
        for pipe in (self._child.stdin, self._child.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):  # it never read all
                    pipe.close()
        with contextlib.suppress(
            subprocess.TimeoutExpired
        ):  # it sleeps in the kernel, and will not wake to do anything
            self._child.wait(_KILLED_S)
