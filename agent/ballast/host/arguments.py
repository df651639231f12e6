"""The command line of ballastctl: what there is to say, and what can only be a mistake."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from ballast import __version__
from ballast.host import backup_verbs, examples, memory_verbs, verbs
from ballast.host.backup_arguments import add_backup
from ballast.host.config import PATH
from ballast.host.connection import ANSWER_TIMEOUT_S
from ballast.host.quantity import parse_duration, parse_size
from ballast.host.verbs import Verb
from ballast.wire.memory_names import PsiTrigger

T = TypeVar("T")

_LEASE_S = (1.0, 600.0)


def parse_arguments(words: list[str]) -> argparse.Namespace:
    """Read the command line; exits with 2 and a word about it where it can only fail."""
    # Split here: argparse would give a part of the command's own options to us.
    words, command = _split_command(words)
    parser = _make_parser()
    args = parser.parse_args(words)
    _check(parser, args, command)
    args.backs_up = "folder" in args
    args.changes_machine = "qmp" in args and not args.backs_up and not getattr(args, "no_reclaim", False)
    args.needs_agent = getattr(args, "level", None) != "none" and getattr(args, "needs_agent", True)
    return args


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
    if (
        args.verb in (verbs.freeze, verbs.forecast, backup_verbs.create)
        and not _LEASE_S[0] <= args.lease <= _LEASE_S[1]
    ):
        parser.error("--lease must be 1s to 600s")
    if args.verb is verbs.freeze and args.max_hold < _LEASE_S[0]:
        parser.error("--max-hold must be 1s or more")
    if args.verb is verbs.online and args.block and args.size is not None:
        parser.error("give a size or blocks, not both")
    if args.verb is memory_verbs.offline and [args.size, args.block, args.dimm].count(None) != 2:
        parser.error("give a size, blocks or a DIMM, one of them")


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ballastctl",
        description="Drive the Ballast agent in a virtual machine.",
        epilog=examples.ABOUT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"ballastctl {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add = partial(_add_verb, commands, [_make_common()])
    add("status", verbs.show_status, "agent, memory and freeze in one view", examples.STATUS)
    _add_watch(add("watch", verbs.watch, "print events until Ctrl-C", examples.WATCH))
    forecast = "what a freeze would cover, and what may go wrong in it"
    _add_scope(add("forecast", verbs.forecast, forecast, examples.FORECAST), "the lease to look ahead for: 30s")
    _add_freeze(add("freeze", verbs.freeze, "freeze file systems, for a command or for a lease", examples.FREEZE))
    thaw = add("thaw", verbs.thaw, "end a freeze and tell whether it held", examples.THAW)
    thaw.add_argument("--id", help="the freeze to end (default: the one there is)")
    online = add("online", verbs.online, "bring hot-added memory online", examples.ONLINE)
    online.add_argument("size", nargs="?", metavar="SIZE", type=_as(parse_size), help="how much, like 512M")
    online.add_argument("--block", type=int, action="append", metavar="N", help="a memory block; may be repeated")
    online.add_argument("--zone", choices=["auto", "kernel", "movable"], help="default: auto")
    _add_offline(add("offline", memory_verbs.offline, "have the guest stop using hot-added memory", examples.OFFLINE))
    _add_balloon(_add_group(commands, "balloon", "give boot memory back to the host, or let the guest have it again"))
    _add_memory(_add_group(commands, "memory", "plug in and take out memory, and why it changed"))
    backups = _add_group(commands, "backup", "back up a running machine, and what one does with backups")
    common, for_all = _make_common(), _make_common(is_target_optional=True)
    add_backup(backups, partial(_add_verb, backups), common, for_all, _add_scope)
    return parser


def _add_group(commands: Any, name: str, about: str) -> Any:
    group = commands.add_parser(name, help=about, description=about[0].upper() + about[1:] + ".")
    return group.add_subparsers(required=True, metavar="COMMAND")


def _add_offline(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("size", nargs="?", metavar="SIZE", type=_as(parse_size), help="how much, like 1G")
    parser.add_argument("--block", type=int, action="append", metavar="N", help="a memory block; may be repeated")
    parser.add_argument("--dimm", type=_as(_parse_address), metavar="ADDRESS", help="the DIMM that begins there")
    _add_offline_timeout(parser)


def _add_offline_timeout(parser: argparse.ArgumentParser) -> None:
    help_ = "how long the guest may try to empty a DIMM (default: 30s)"
    parser.add_argument("--offline-timeout", type=_as(parse_duration), default=30.0, metavar="TIME", help=help_)


def _add_balloon(group: Any) -> None:
    parents = [_make_size("how much the balloon holds in the end, like 256M"), _make_common()]
    add = partial(_add_verb, group)
    set_ = add(
        parents, "set", memory_verbs.balloon_set, "inflate or deflate the balloon to a size", examples.BALLOON_SET
    )
    _add_qmp(set_)
    set_.add_argument(
        "--safe-vhost-user",
        action="append",
        metavar="ID",
        help="a vhost-user device whose process has pinned none of the guest's memory; may be repeated",
    )
    set_.add_argument(
        "--no-reclaim", action="store_true", help="only have the guest do without: the host gets nothing of it"
    )
    add(
        [_make_common()],
        "show",
        memory_verbs.balloon_show,
        "what the balloon holds, looked up now",
        examples.BALLOON_SHOW,
    )


def _add_memory(group: Any) -> None:
    parents = [_make_size("how much, like 1G"), _make_common()]
    add = partial(_add_verb, group, parents)
    _add_qmp(add("add", memory_verbs.memory_add, "plug in a DIMM and have the guest use it", examples.MEMORY_ADD))
    remove = add(
        "remove", memory_verbs.memory_remove, "have the guest empty DIMMs, and take them out", examples.MEMORY_REMOVE
    )
    _add_qmp(remove)
    _add_offline_timeout(remove)
    about = "what changed memory lately, from which numbers and why"
    _add_verb(group, [_make_common()], "explain", memory_verbs.explain, about, examples.MEMORY_EXPLAIN)


def _make_size(about: str) -> argparse.ArgumentParser:
    sized = argparse.ArgumentParser(add_help=False)
    sized.add_argument("size", metavar="SIZE", type=_as(parse_size), help=about)
    return sized


def _add_qmp(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--qmp", metavar="PATH", help="QEMU's QMP socket (default: from host.toml)")


def _make_common(*, is_target_optional: bool = False) -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    if is_target_optional:
        common.add_argument("target", nargs="?", metavar="TARGET", help="name of a VM (default: all there are)")
    else:
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
    commands: Any, parents: list[argparse.ArgumentParser], name: str, verb: Verb, about: str, epilog: str
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        parents=parents,
        help=about,
        description=about[0].upper() + about[1:] + ".",
        epilog=epilog,
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
    _add_scope(parser, "the guest thaws by itself after it: 30s")
    add = parser.add_argument
    add("--max-hold", type=_as(parse_duration), default=600.0, metavar="TIME", help="renew for no longer: 10m")
    add("--level", choices=["application", "filesystem"], help="whether programs are asked to settle first")
    add("--on-failure", choices=["abort", "degrade"], help="where a part fails: thaw all, or go on without it")


def _add_scope(parser: argparse.ArgumentParser, lease: str) -> None:
    add = parser.add_argument
    add("--lease", type=_as(parse_duration), default=30.0, metavar="TIME", help=lease)
    add("--mountpoint", action="append", metavar="M", help="freeze only this; may be repeated")
    add("--exclude", action="append", metavar="GLOB", help="freeze all but these mount points; may be repeated")


def _parse_address(text: str) -> int:
    return int(text, 0)


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
