"""DIMMs that come, are used and go, many times over: python -m tests.vm.dimms [--count N].

Each round has `ballastctl memory add` plug in a DIMM, starts a program that fills it and keeps changing what it wrote
(tenant.py), has `ballastctl memory remove` take the DIMM from under it, and lets the program of the round before tell
whether every page is still as it was written: that one has lived through two removals and one addition, at the same
address. The figures go to stdout, a line a round, and the exit status is 1 if a page was changed, a DIMM was half
offline, or one stayed without a block and a reason named.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import ballast
from tests.lab.guest import Guest
from tests.vm.conftest import TOKEN, boot

TENANT = Path(__file__).parent / "tenant.py"
IN_GUEST = "/run/lab-tenant.py"
FILE = "/mnt/data0/tenant.file"
ANON_MIB, SHM_MIB, FILE_MIB = 72, 48, 96
DIMM_BYTES = 256 << 20
TIMEOUT_S = 120.0
# Pages of the movable zone that are there, and that are free.
_IN_USE = re.compile(r"block (\d+) stays in use: (\S+)")
_MOVABLE = re.compile(r"zone +Movable\n +pages free +(\d+)(?:\n.*)*?\n +present +(\d+)")


class RoundFailed(Exception):
    """A round that did not end as it must."""


class Campaign:
    """The rounds in one guest, and the programs that live in it from one round to the next."""

    def __init__(self, guest: Guest) -> None:
        self._guest = guest
        self._round = 0
        self._tenants: list[str] = []
        self._token = guest.dir / "campaign.token"
        self._token.touch(mode=0o600)
        self._token.write_text(TOKEN)
        guest.put(IN_GUEST, TENANT.read_bytes())
        self._boot_blocks = self._states()

    def run_round(self) -> dict[str, Any]:
        """One round; RoundFailed."""
        self._round += 1
        started_s = time.monotonic()
        self._ctl("add")
        if set(self._added().values()) != {"online"}:
            raise RoundFailed(f"added: {self._added()}")
        self._move_in()
        used_bytes = self._movable_used_bytes()
        begun_s = time.monotonic()
        refused = self._remove()
        took_s = time.monotonic() - begun_s
        report = self._move_out() if len(self._tenants) > 1 else None
        if refused:
            self._empty_and_remove()
        if added := self._added():
            raise RoundFailed(f"blocks are left: {added}")
        return {
            "round": self._round,
            "used-mib": used_bytes >> 20,
            "refused": refused,
            "remove-s": round(took_s, 2),
            "tenant": report,
            "seconds": round(time.monotonic() - started_s, 1),
        }

    def finish(self) -> None:
        """Let all programs end, each with a look at its memory."""
        while self._tenants:
            self._move_out()
        self._guest.run(["rm", "-f", FILE, IN_GUEST])

    def _ctl(self, verb: str) -> dict[str, Any]:
        """Run `ballastctl memory`; what it tells, and its exit status."""
        guest = self._guest
        target = [f"unix:{guest.vsock_path}?connect=640", "--token-file", str(self._token)]
        size = ["--qmp", f"unix:{guest.qmp_path}", "--json"]
        argv = [sys.executable, "-m", "ballast.host.cli", "memory", verb, str(DIMM_BYTES), *target, *size]
        environment = os.environ | {"PYTHONPATH": str(Path(ballast.__file__).parents[1])}
        ended = subprocess.run(argv, capture_output=True, text=True, env=environment, timeout=TIMEOUT_S, check=False)
        try:
            return {**json.loads(ended.stdout), "status": ended.returncode}
        except ValueError as error:
            raise RoundFailed(f"ballastctl memory {verb}: {ended}") from error

    def _remove(self) -> dict[str, Any] | None:
        """Have the DIMM come off; None, or the block that stayed and why, and then the DIMM is as it was."""
        result = self._ctl("remove")
        added = self._added()
        (dimm,) = result["dimms"]
        if dimm["result"] == "removed":
            if added or "reason" in dimm:
                raise RoundFailed(f"told as removed: {added}, {result}")
            self._guest.bury(DIMM_BYTES)
            return None
        named = _IN_USE.search(dimm["reason"])
        if not named or set(added.values()) != {"online"}:
            raise RoundFailed(f"half offline, or without a reason: {added}, {result}")
        return {"block": int(named[1]), "reason": named[2]}

    def _empty_and_remove(self) -> None:
        """Let all programs end, so that the next round has a place for its DIMM."""
        while self._tenants:
            self._move_out()
        if refused := self._remove():
            raise RoundFailed(f"not even an unused DIMM comes off: {refused}")

    def _move_in(self) -> None:
        tenant = f"lab-tenant-{self._round}"
        self._tenants.append(tenant)
        program = f"/usr/bin/python3 -IB {IN_GUEST} {tenant} {ANON_MIB} {SHM_MIB} {FILE} {FILE_MIB}"
        self._guest.run(f"setsid {program} </dev/null >/run/{tenant}.said 2>&1 &")
        self._guest.run(f"until grep -q filled /run/{tenant}.said; do sleep 0.1; done", timeout_s=TIMEOUT_S)

    def _move_out(self) -> dict[str, Any]:
        """The oldest program ends; what it says."""
        tenant = self._tenants.pop(0)
        said = self._guest.run(
            f"cd /run; touch {tenant}.stop; until grep -q bad {tenant}.said; do sleep 0.1; done; cat {tenant}.said;"
            f" rm {tenant}.said {tenant}.stop",
            timeout_s=TIMEOUT_S,
        )
        report = dict(json.loads(said.stdout.splitlines()[-1]))
        if report["bad"]:
            raise RoundFailed(f"pages were changed: {report}")
        return report

    def _states(self) -> dict[int, str]:
        """State of each block, by lsmem(1)."""
        listed = self._guest.run(["lsmem", "--all", "--raw", "--noheadings", "--output=block,state"]).stdout
        return {int(block): state for block, state in (line.split() for line in listed.splitlines())}

    def _added(self) -> dict[int, str]:
        """Blocks of the DIMM; the others are as they were."""
        states = self._states()
        if self._boot_blocks.items() - states.items():
            raise RoundFailed(f"boot memory is not as it was: {states}")
        return {block: state for block, state in states.items() if block not in self._boot_blocks}

    def _movable_used_bytes(self) -> int:
        found = _MOVABLE.search(self._guest.run(["cat", "/proc/zoneinfo"]).stdout)
        return 4096 * (int(found[2]) - int(found[1])) if found else 0


def main() -> int:
    """Run the campaign."""
    parser = argparse.ArgumentParser(prog="python -m tests.vm.dimms", description=__doc__)
    parser.add_argument("--count", type=int, default=100, help="rounds (100)")
    parser.add_argument("--suite", default="trixie", help="the guest's Debian (trixie)")
    options = parser.parse_args()
    failures = refused = 0
    with boot(options.suite) as guest:
        campaign = Campaign(guest)
        for number in range(options.count):
            try:
                report = campaign.run_round()
            except RoundFailed as error:
                failures += 1
                sys.stdout.write(f"round {number + 1}: FAILED: {error}\n")
            else:
                refused += report["refused"] is not None
                sys.stdout.write(json.dumps(report) + "\n")
            sys.stdout.flush()
        campaign.finish()
    sys.stdout.write(f"{options.count} rounds, {refused} refused with block and reason, {failures} failed\n")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
