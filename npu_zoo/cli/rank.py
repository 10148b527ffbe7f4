"""The program of one rank that ``npu-zoo launch`` starts: ``python -m npu_zoo.cli.rank LAUNCHER COMMAND …``."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from npu_zoo.parallel.worker import die_with_parent


def main(arguments: Sequence[str]) -> int:
    """Run a command of npu-zoo that ends with its launcher, however that ends; only rank 0 has its standard input.

    Args:
        arguments: the launcher's process, and the command.

    Returns:
        The command's exit code.
    """
    launcher, *command = arguments
    die_with_parent(int(launcher))
    if os.environ.get("RANK") != "0":
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        os.close(nothing)
    from npu_zoo.cli import main as run_command

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
