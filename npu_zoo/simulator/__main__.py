"""``python -m npu_zoo.simulator PRODUCT SCRIPT|-m MODULE [ARGUMENT …]``: run a program on a simulated Ascend server.

The program is run as ``python`` would run it. What it did on the device is printed on standard error when it ends, or
written to the file that ``NPU_ZOO_SIMULATE_REPORT`` names.
"""

from __future__ import annotations

import os
import runpy
import sys

from npu_zoo.simulator.activation import REPORT_VARIABLE, VARIABLE, activate_from_environment
from npu_zoo.simulator.errors import SimulatorError
from npu_zoo.simulator.products import MACHINES

USAGE = f"usage: python -m npu_zoo.simulator {{{','.join(MACHINES)}}} SCRIPT|-m MODULE [ARGUMENT ...]"


def main(arguments: list[str]) -> int:
    """Run what the arguments name; 2 where they name nothing, 4 where the runtime cannot be started."""
    if len(arguments) < 2 or arguments[1:] == ["-m"]:
        print(USAGE, file=sys.stderr)
        return 2
    product, *program = arguments
    os.environ[VARIABLE] = product
    os.environ.setdefault(REPORT_VARIABLE, "-")
    try:
        activate_from_environment()
    except SimulatorError as error:
        print(f"error: {error}", file=sys.stderr)
        return 4
    if program[0] == "-m":
        sys.argv = program[1:]
        sys.path[0] = ""
        runpy.run_module(program[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = program
        sys.path[0] = os.path.dirname(os.path.abspath(program[0]))  # noqa: PTH100, PTH120
        runpy.run_path(program[0], run_name="__main__")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
