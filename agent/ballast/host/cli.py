"""ballastctl: the command line."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from functools import partial

from ballast.host import verbs
from ballast.host.agent import Agent
from ballast.host.arguments import parse_arguments
from ballast.host.config import ConfigError, find_route, find_vm, read_backups
from ballast.host.machine import NotReclaimable
from ballast.host.memory_verbs import qmp_of
from ballast.host.show import say
from ballast.host.verbs import Connect, Exit, Verb
from ballast.wire.errors import AgentError, Unauthenticated

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return the exit status."""
    args = parse_arguments(list(sys.argv[1:] if argv is None else argv))
    try:
        if args.changes_machine:
            vm = find_vm(args.target, args.config)
            args.qmp = qmp_of(vm, args.qmp)
            args.safe_vhost_user = {*vm.safe_vhost_user, *(getattr(args, "safe_vhost_user", None) or ())}
        if args.backs_up:
            args.backups = read_backups(args.config)
            args.vm = find_vm(args.target, args.config) if args.target else None
            if "qmp" in args and not args.vm.libvirt:
                args.qmp = qmp_of(args.vm, args.qmp)
        connect = _route(args) if args.needs_agent else partial(_connect_later, args)
    except (ConfigError, ValueError) as error:
        say(str(error))
        return Exit.USAGE
    except NotReclaimable as error:
        say(error.desc)
        return Exit.REFUSED
    return _run(args, connect)


def _route(args: argparse.Namespace) -> Connect:
    route = find_route(args.target, args.config, args.token_file)
    return partial(Agent.connect, route.connect, route.token, args.timeout)


def _connect_later(args: argparse.Namespace) -> AbstractAsyncContextManager[Agent]:
    """For what mostly has no use for an agent, so that none need be known."""
    return _route(args)()


def _run(args: argparse.Namespace, connect: Connect) -> int:
    """Run the verb; the first signal cancels it, and it cleans up, which includes a thaw, before we leave."""
    caught: list[signal.Signals] = []

    async def run_verb() -> int:
        verb: Verb = args.verb
        work = asyncio.ensure_future(verb(args, connect))
        loop = asyncio.get_running_loop()

        def stop(number: signal.Signals) -> None:
            if caught:
                say("already ending; if it has to be now, kill me: a lease thaws what is frozen")
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


if __name__ == "__main__":
    sys.exit(main())
