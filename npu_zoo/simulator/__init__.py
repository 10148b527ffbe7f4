"""A simulated Ascend runtime under the real torch_npu.

The stub libraries that torch_npu links are built from the installed wheel; device memory is host memory; operators have
golden CPU semantics and the documented rules of each chip. It imports nothing else of the package.

::

    from npu_zoo.simulator import activate, measure

    activate("atlas_800i_a2")  # before torch is imported; or NPU_ZOO_SIMULATE=atlas_800i_a2
    import torch

    with measure() as report:
        torch.ones(4, device="npu") + 1
    print(report.to_text())
"""

from __future__ import annotations

from npu_zoo.simulator.activation import activate, activate_from_environment, simulated_machine
from npu_zoo.simulator.errors import (
    CaptureError,
    NoSemantics,
    OperatorError,
    RuleBroken,
    SimulatorError,
    Unavailable,
)
from npu_zoo.simulator.products import MACHINES
from npu_zoo.simulator.report import Report, measure

__all__ = [
    "MACHINES",
    "CaptureError",
    "NoSemantics",
    "OperatorError",
    "Report",
    "RuleBroken",
    "SimulatorError",
    "Unavailable",
    "activate",
    "activate_from_environment",
    "measure",
    "simulated_machine",
]
