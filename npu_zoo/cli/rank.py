"""The program of one rank that ``npu-zoo launch`` starts: ``python -m npu_zoo.cli.rank LAUNCHER COMMAND …``."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence

from npu_zoo.parallel.worker import die_with_parent

_SECONDS_FOR_RANK_0 = 3.0
"""How long a failed rank lets rank 0 tell of it, and end first: the launcher ends all ranks once one has ended."""


def main(arguments: Sequence[str]) -> int:
    """Run a command of npu-zoo that ends with its launcher, however that ends; only rank 0 has its standard input.

    Args:
        arguments: the launcher's process, and the command.

    Returns:
        The command's exit code.
    """
    launcher, *command = arguments
    die_with_parent(int(launcher))
    leads = os.environ.get("RANK") == "0"
    if not leads:
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        os.close(nothing)
    from npu_zoo.cli import main as run_command

    code = run_command(command)
    if code and not leads:
        time.sleep(_SECONDS_FOR_RANK_0)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
