"""The loop that every writer of ours runs: requests on standard input, answers on standard output (docs/writers.md).

Nothing of the agent, and of the standard library only what starts fast: all writers start before each freeze.
"""

from __future__ import annotations

import json
import sys
import time

TYPE_CHECKING = False  # typing itself would be a tenth of a writer's start
if TYPE_CHECKING:
    from typing import Any

VERBS = ("identify", "prepare", "freeze", "thaw", "post", "abort")
# Of the time that a verb has, what is left for the answer to arrive: our word says more than that we were killed.
MARGIN = 0.1
# Who does not even say who it is in this time will not be ready either, and the deadline is for all phases together.
IDENTIFY_S = 10.0


class AbsentError(Exception):
    """identify: there is nothing to do in this guest."""


class WriterError(Exception):
    """What was asked could not be done; ``retryable`` if it is worth another try at once."""

    def __init__(self, reason: str, *, retryable: bool = False) -> None:
        super().__init__(reason)
        self.retryable = retryable


class Request:
    """One line from the agent. ``fields`` holds all of it, as it came."""

    def __init__(self, fields: dict[str, Any]) -> None:
        self.fields = fields
        self.verb = str(fields["verb"])
        wait_s = (1 - MARGIN) * float(fields["deadline-ms"]) / 1000
        self._due_s = time.monotonic() + (min(wait_s, IDENTIFY_S) if self.verb == "identify" else wait_s)

    @property
    def config(self) -> dict[str, Any]:
        """``[writer.NAME]`` of agent.toml, or nothing."""
        config = self.fields.get("config")
        return config if isinstance(config, dict) else {}

    def left_s(self) -> float:
        """Seconds that are left for the answer, never negative."""
        return max(0.0, self._due_s - time.monotonic())


class Writer:
    """Does nothing at each verb. A method returns the answer, or raises AbsentError, WriterError or OSError."""

    def identify(self, request: Request) -> dict[str, Any]:
        """Say what differs from the defaults. As root, and once more as ``user`` if the answer names one."""
        return {}

    def prepare(self, request: Request) -> dict[str, Any]:
        """Do what takes long."""
        return {}

    def freeze(self, request: Request) -> dict[str, Any]:
        """Hold, and keep still from now on."""
        return {}

    def thaw(self, request: Request) -> dict[str, Any]:
        """Let go, and say whether it held."""
        return {"held": True}

    def post(self, request: Request) -> dict[str, Any]:
        """Take note of how it ended."""
        return {}

    def abort(self, request: Request) -> dict[str, Any]:
        """Undo what was done so far. It may be the only request, in a process that was started for it."""
        return {}


def run(writer: Writer) -> int:
    """Answer each request, until there are no more. Returns the exit status."""
    for line in sys.stdin:
        sys.stdout.write(json.dumps(_answer(writer, line)) + "\n")
        sys.stdout.flush()
    return 0


def _answer(writer: Writer, line: str) -> dict[str, Any]:
    try:
        request = Request(json.loads(line))
        if request.verb not in VERBS:
            return {"error": f"unknown verb {request.verb}"}
        answer: dict[str, Any] = getattr(writer, request.verb)(request)
    except AbsentError as error:
        return {"absent": str(error)}
    except WriterError as error:
        return {"error": str(error), "retryable": error.retryable}
    except OSError as error:
        return {"error": str(error)}
    except Exception as error:  # noqa: BLE001 - a bug: the agent gets a short answer, the journal the traceback
        sys.excepthook(type(error), error, error.__traceback__)
        return {"error": f"{type(error).__name__}: {error}"}
    return answer
