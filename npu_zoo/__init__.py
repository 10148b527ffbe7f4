"""npu-zoo: a plugin-based model zoo for Ascend NPUs.

The public names are imported on first use, so ``import npu_zoo`` brings neither torch nor pydantic.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from npu_zoo.core.hookspecs import hookimpl
    from npu_zoo.core.sampling import SamplingParams
    from npu_zoo.engine.llm import LLM

__version__ = "0.1.0"
__all__ = ["LLM", "SamplingParams", "__version__", "hookimpl"]

_HOMES = {
    "LLM": "npu_zoo.engine.llm",
    "SamplingParams": "npu_zoo.core.sampling",
    "hookimpl": "npu_zoo.core.hookspecs",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'npu_zoo' has no attribute '{name}'")
    simulate()
    return getattr(importlib.import_module(_HOMES[name]), name)


def simulate() -> None:
    """Start the simulated Ascend runtime that ``NPU_ZOO_SIMULATE`` names; nothing where it is unset.

    Raises:
        npu_zoo.simulator.errors.SimulatorError: it cannot be started, or torch has been imported already.
    """
    if os.environ.get("NPU_ZOO_SIMULATE"):
        importlib.import_module("npu_zoo.simulator.activation").activate_from_environment()


def __dir__() -> list[str]:
    return sorted(__all__)
