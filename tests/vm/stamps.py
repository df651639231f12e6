"""Runs inside the guest: stamps a trigger of its own, and the agent's event for the same, when it is there.

    stamps.py KIND STALL_US WINDOW_US COUNT

The kernel looks at both triggers in one go, so what lies between them is the agent's way from POLLPRI to the bytes. It
runs before all others, from locked memory, so that what it measures is not its own waiting. Beside the agent a child as
important as it waits for a trigger of its own and then writes a byte: nobody's way could be shorter, in this guest and
this moment. Prints JSON by CLOCK_REALTIME: {"fired_s": [...], "least_s": [...], "heard": [[arrived_s, level], ...]}.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import socket
import sys
import time

DEADLINE_S = 100.0
MCL_CURRENT_FUTURE = 3
AGENT_NICE = -10  # of its unit


def open_trigger(text: str) -> int:
    """A trigger on the system-wide figure."""
    trigger = os.open("/proc/pressure/memory", os.O_RDWR | os.O_NONBLOCK)
    os.write(trigger, f"{text}\0".encode())
    return trigger


def echo(text: str, out: int) -> None:
    """Write a byte whenever it fires, for ever."""
    ctypes.CDLL(None).mlockall(MCL_CURRENT_FUTURE)
    os.nice(AGENT_NICE)
    poll = select.poll()
    poll.register(open_trigger(text), select.POLLPRI)
    while True:
        poll.poll()
        os.write(out, b".")


def subscribe(kind: str, stall_us: int, window_us: int) -> socket.socket:
    """The agent's events for the same trigger."""
    agent = socket.socket(socket.AF_UNIX)
    agent.connect("/run/ballast/agent.sock")
    psi = {"kind": kind, "stall-us": stall_us, "window-us": window_us}
    ask = {"execute": "ballast-subscribe", "arguments": {"events": ["BALLAST_PRESSURE"], "psi": [psi]}}
    agent.sendall(json.dumps(ask).encode() + b"\n")
    assert b"return" in agent.recv(1 << 16)
    return agent


def main() -> None:
    """Stop after COUNT events."""
    kind, stall_us, window_us, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    text = f"{kind} {stall_us} {window_us}"
    echoed, out = os.pipe()
    if (child := os.fork()) == 0:
        echo(text, out)
    os.close(out)
    ctypes.CDLL(None).mlockall(MCL_CURRENT_FUTURE)
    os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(10))
    agent, trigger = subscribe(kind, stall_us, window_us), open_trigger(text)
    poll = select.poll()
    for fd, events in ((trigger, select.POLLPRI), (agent.fileno(), select.POLLIN), (echoed, select.POLLIN)):
        poll.register(fd, events)
    fired_s: list[float] = []
    least_s: list[float] = []
    heard: list[tuple[float, str]] = []
    end_s = time.monotonic() + DEADLINE_S
    while len(heard) < count and time.monotonic() < end_s:
        for fd, _ in poll.poll(1000):
            now_s = time.time()
            if fd == trigger:
                fired_s.append(now_s)
            elif fd == echoed:
                least_s += [now_s] * len(os.read(echoed, 1 << 10))
            else:
                heard += [(now_s, json.loads(line)["data"]["level"]) for line in agent.recv(1 << 16).splitlines()]
    sys.stdout.write(json.dumps({"fired_s": fired_s, "least_s": least_s, "heard": heard}))
    os.kill(child, signal.SIGKILL)


if __name__ == "__main__":
    main()
