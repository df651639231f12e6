"""Two test writers of different levels that write down what they are told, and what must be read there after a fault.

They log to a tmpfs, and to the serial console, which outlives a reboot. What a writer is told is written down when it
comes; that it has let go, when it has: one that is killed over its thaw has not.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

LOG, TROUBLE = "/run/lab-writers.log", "/run/lab-trouble"
CONSOLE = re.compile(r"lab-writer (\S+ \S+)")
LEVELS = {"lab-shop": "front-end", "lab-base": "back-end"}  # in the order of freezing
PROGRAM = """#!/bin/sh
# TROUBLE has a line "WRITER VERB WHAT": what this one does wrong, and when.
said() {
    echo "NAME $verb" >>LOG
    echo "lab-writer NAME $verb" >/dev/ttyS0
}
act() {
    [ "$who $when" = "NAME $verb" ] || return 0
    case $what in
    hang) sleep 600 ;;
    exit) exit 1 ;;
    fork) sleep 600 & ;;
    fork-exit) sleep 600 & exit 1 ;;
    esac
}
who= when= what=
[ ! -e TROUBLE ] || read -r who when what <TROUBLE
deadlines=
[ "$what" != hang ] || deadlines=', "prepare-ms": 1500, "freeze-ms": 1500, "thaw-ms": 5000'
while read -r request; do
    verb=${request#*'"verb": "'}
    verb=${verb%%'"'*}
    case $verb in
    identify) echo '{"level": "LEVEL"'"$deadlines"'}' && continue ;;
    thaw) act && said ;;
    *) said && act ;;
    esac
    echo '{}'
done
"""


def program(name: str) -> bytes:
    """The writer's."""
    text = PROGRAM.replace("NAME", name).replace("LEVEL", LEVELS[name])
    return text.replace("LOG", LOG).replace("TROUBLE", TROUBLE).encode()


def complaint(told: Iterable[str], *, in_order: bool = True) -> str | None:
    """What is wrong with what they were told ("WRITER VERB" each) in one freeze; None if nothing is.

    Each that was asked to prepare has let go once, in the reverse of the order of freezing unless one failed by itself.
    """
    lines = list(told)
    undone = [line.split()[0] for line in lines if line.split()[1] in ("thaw", "abort")]
    prepared = [line.split()[0] for line in lines if line.split()[1] == "prepare"]
    if sorted(prepared) != sorted(LEVELS):
        return f"not each was asked to prepare once: {lines}"
    if sorted(undone) != sorted(LEVELS):
        return f"not each was undone once: {lines}"
    if in_order and undone != list(reversed(LEVELS)):
        return f"undone in the wrong order: {lines}"
    return None
