"""The lab by hand: `python -m tests.lab boot [--suite S]` and `python -m tests.lab image SUITE`."""

import argparse
import sys
import time
from pathlib import Path

from tests.lab import image
from tests.lab.guest import CommandFailed, Guest

DIST = Path(__file__).parents[2] / "dist"


def boot(suite: str) -> None:
    """Boot a guest with the packages of dist/ and run what is typed, a line at a time, until Ctrl-C or Ctrl-D."""
    start_s = time.monotonic()
    with Guest(image.build(suite), disks=[("ext4", 512 << 20), ("xfs", 512 << 20)]) as guest:
        print(f"booting {suite}; console: {guest.console}", flush=True)
        guest.wait_boot()
        if debs := [*DIST.glob("ballast-common_*.deb"), *DIST.glob("ballast-agent_*.deb")]:
            guest.install(debs)
        print(f"up after {time.monotonic() - start_s:.0f} s; sockets in {guest.dir}; installed: {len(debs)} packages")
        while True:
            try:
                result = guest.run(input("guest# "), timeout_s=600, check=False)
                print(result.stdout + result.stderr, end="")
            except (TimeoutError, CommandFailed) as error:
                print(error)


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.lab", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("boot", help="a guest to type into").add_argument(
        "--suite", default="trixie", choices=image.SUITES
    )
    commands.add_parser("image", help="build an image").add_argument("suite", choices=image.SUITES)
    arguments = parser.parse_args()
    if arguments.command == "image":
        print(image.build(arguments.suite))
        return
    try:
        boot(arguments.suite)
    except (KeyboardInterrupt, EOFError):
        sys.exit(0)


if __name__ == "__main__":
    main()
