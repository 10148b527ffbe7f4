"""The command line. ``main`` is the console script; what it needs is imported inside it, command by command."""

from __future__ import annotations

import sys
from collections.abc import Sequence

NO_HARDWARE = 4


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line on ``argv`` (without the program's name; sys.argv's where None) and return the exit code."""
    from npu_zoo import __version__, simulate

    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments == ["--version"]:
        print(f"npu-zoo {__version__}")
        return 0
    try:
        simulate()
    except RuntimeError as error:  # the simulator stands alone, so its errors are not of the package's tree
        print(f"error: {error}", file=sys.stderr)
        return NO_HARDWARE
    try:
        from npu_zoo.cli.app import run_app

        return run_app(arguments)
    except KeyboardInterrupt:  # while the imports still run
        return 130
