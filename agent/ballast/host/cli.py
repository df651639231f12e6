"""ballastctl: the command line."""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from ballast import __version__
from ballast.host import verbs
from ballast.host.agent import Agent
from ballast.host.config import PATH, ConfigError, find_route
from ballast.host.connection import ANSWER_TIMEOUT_S
from ballast.host.quantity import parse_duration, parse_size
from ballast.host.show import say
from ballast.host.verbs import Connect, Exit, Verb
from ballast.wire.errors import AgentError, Unauthenticated
from ballast.wire.names import PsiTrigger

T = TypeVar("T")

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_LEASE_S = (1.0, 600.0)

_ABOUT = """\
TARGET is a connect string or the name of a VM in host.toml:
  vsock:42                        guest CID 42 on port 640
  unix:/run/ballast/agent.sock    the local socket, or QEMU's socket of a virtio-serial port
  unix:/run/vm1.vsock?connect=640 a user-space vsock daemon
  web1                            [vm.web1] in host.toml

Exit status: 0 done, 1 failed, 2 usage, 3 unreachable, 4 refused, 5 partial, 6 the freeze did not hold."""

_STATUS = """\
examples:
  ballastctl status vsock:42 --token-file /etc/ballast/tokens/web1
  ballastctl status web1 --json | jq .memory.level

Without a token, a guest tells of its agent only; the exit status is then 5."""

_WATCH = """\
examples:
  ballastctl watch web1
  ballastctl watch web1 --psi some:150000:1000000 --psi full:100000:1000000 --demand 1000
  ballastctl watch web1 --json | jq -r .event"""

_FREEZE = """\
examples:
  ballastctl freeze web1 --lease 60s
  ballastctl freeze web1 -- virsh snapshot-create-as web1 --disk-only --no-metadata
  ballastctl freeze web1 --mountpoint / --mountpoint /var -- ./snapshot.sh
  ballastctl freeze web1 --exclude '/mnt/*' --on-failure degrade --json -- ./snapshot.sh

Without COMMAND the file systems stay frozen until `ballastctl thaw`, or until the lease ends.
With COMMAND they are frozen while it runs: the lease is renewed at each third of it, for at most --max-hold.
The command finds BALLAST_ID, BALLAST_TARGET and BALLAST_CONSISTENCY in its environment. With --json its output
goes to stderr. Its failure is exit status 1; a freeze that did not hold until the thaw is 6."""

_THAW = """\
examples:
  ballastctl thaw web1
  ballastctl thaw web1 --id 6f1c1c1e-5f0e-4d6b-9b39-3f0a3f1d8f11

Exit status 6 means that the freeze had ended before, by itself: a snapshot taken since is not consistent."""

_ONLINE = """\
examples:
  ballastctl online web1               every offline memory block
  ballastctl online web1 512M
  ballastctl online web1 --block 40 --block 41 --zone movable"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    # Split here: argparse would give a part of the command's own options to us.
    words, command = _split_command(words)
    parser = _make_parser()
    args = parser.parse_args(words)
    _check(parser, args, command)
    try:
        route = find_route(args.target, args.config, args.token_file)
    except (ConfigError, ValueError) as error:
        say(str(error))
        return Exit.USAGE
    return _run(args, partial(Agent.connect, route.connect, route.token, args.timeout))


def _run(args: argparse.Namespace, connect: Connect) -> int:
    """Run the verb; the first signal cancels it, and it cleans up, which includes a thaw, before we leave."""
    caught: list[signal.Signals] = []

    async def run_verb() -> int:
        verb: Verb = args.verb
        work = asyncio.ensure_future(verb(args, connect))
        loop = asyncio.get_running_loop()

        def stop(number: signal.Signals) -> None:
            if caught:
                say("already ending; if it has to be now, kill me: the lease thaws what is frozen")
                return
            caught.append(number)
            work.cancel()

        for number in _SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup
                loop.add_signal_handler(number, stop, number)
        return await work

    code: int = Exit.FAILED
    try:
        code = asyncio.run(run_verb())
    except asyncio.CancelledError:
        pass
    except AgentError as error:
        hint = " (--token-file)" if isinstance(error, Unauthenticated) else ""
        say(error.desc + hint)
        code = Exit.of(error)
    except BrokenPipeError:
        # Whoever read our output has gone; Python would complain when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if caught:
        return Exit.DONE if args.verb is verbs.watch and caught[0] == signal.SIGINT else 128 + caught[0]
    return code


def _split_command(words: list[str]) -> tuple[list[str], list[str] | None]:
    if "--" not in words:
        return words, None
    at = words.index("--")
    return words[:at], words[at + 1 :]


def _check(parser: argparse.ArgumentParser, args: argparse.Namespace, command: list[str] | None) -> None:
    """Refuse, before anything is frozen, what can only fail; exits."""
    args.command = command
    if command is not None:
        if args.verb is not verbs.freeze:
            parser.error("only freeze takes a command after --")
        if not command:
            parser.error("there is no command after --")
        if shutil.which(command[0]) is None:
            parser.error(f"no such command: {command[0]}")
    if args.verb is verbs.freeze and not _LEASE_S[0] <= args.lease <= _LEASE_S[1]:
        parser.error("--lease must be 1s to 600s")
    if args.verb is verbs.freeze and args.max_hold < _LEASE_S[0]:
        parser.error("--max-hold must be 1s or more")
    if args.verb is verbs.online and args.block and args.size is not None:
        parser.error("give a size or blocks, not both")


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ballastctl",
        description="Drive the Ballast agent in a virtual machine.",
        epilog=_ABOUT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"ballastctl {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add = partial(_add_verb, commands, _make_common())
    add("status", verbs.show_status, "agent, memory and freeze in one view", _STATUS)
    _add_watch(add("watch", verbs.watch, "print events until Ctrl-C", _WATCH))
    _add_freeze(add("freeze", verbs.freeze, "freeze file systems, for a command or for a lease", _FREEZE))
    thaw = add("thaw", verbs.thaw, "end a freeze and tell whether it held", _THAW)
    thaw.add_argument("--id", help="the freeze to end (default: the one there is)")
    online = add("online", verbs.online, "bring hot-added memory online", _ONLINE)
    online.add_argument("size", nargs="?", metavar="SIZE", type=_as(parse_size), help="how much, like 512M")
    online.add_argument("--block", type=int, action="append", metavar="N", help="a memory block; may be repeated")
    online.add_argument("--zone", choices=["auto", "kernel", "movable"], help="default: auto")
    return parser


def _make_common() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("target", metavar="TARGET", help="connect string or name of a VM")
    common.add_argument("--json", action="store_true", help="output for programs, with the names of the wire")
    common.add_argument("--token-file", type=Path, metavar="FILE", help="token for vsock (default: from host.toml)")
    common.add_argument("--config", type=Path, default=PATH, metavar="FILE", help="default: %(default)s")
    common.add_argument(
        "--timeout",
        type=_as(parse_duration),
        default=ANSWER_TIMEOUT_S,
        metavar="TIME",
        help="how long to wait for the agent's answer (default: 10s); freezing and thawing may take longer",
    )
    return common


def _add_verb(
    commands: Any, common: argparse.ArgumentParser, name: str, verb: Verb, about: str, examples: str
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        parents=[common],
        help=about,
        description=about[0].upper() + about[1:] + ".",
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(verb=verb)
    return parser


def _add_watch(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--psi",
        type=_as(_parse_psi),
        action="append",
        metavar="KIND:STALL:WINDOW",
        help="pressure to be told of: some or full, and microseconds; may be repeated (default: the agent's choice)",
    )
    parser.add_argument("--demand", type=int, metavar="MS", help="also print what the guest needs, every MS")


def _add_freeze(parser: argparse.ArgumentParser) -> None:
    parser.usage = "ballastctl freeze TARGET [options] [-- COMMAND...]"
    add = parser.add_argument
    add(
        "--lease",
        type=_as(parse_duration),
        default=30.0,
        metavar="TIME",
        help="the guest thaws by itself after it: 30s",
    )
    add("--max-hold", type=_as(parse_duration), default=600.0, metavar="TIME", help="renew for no longer: 10m")
    add("--mountpoint", action="append", metavar="M", help="freeze only this; may be repeated")
    add("--exclude", action="append", metavar="GLOB", help="freeze all but these mount points; may be repeated")
    add("--level", choices=["application", "filesystem"], help="whether programs are asked to settle first")
    add("--on-failure", choices=["abort", "degrade"], help="where a part fails: thaw all, or go on without it")


def _parse_psi(text: str) -> PsiTrigger:
    kind, stall, window = text.split(":")
    if kind not in ("some", "full"):
        raise ValueError("KIND is some or full")
    return PsiTrigger("some" if kind == "some" else "full", int(stall), int(window))


def _as(parse: Callable[[str], T]) -> Callable[[str], T]:
    """Let argparse show what a parser says is wrong."""

    def convert(text: str) -> T:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text!r}: {error}") from error

    return convert


if __name__ == "__main__":
    sys.exit(main())
