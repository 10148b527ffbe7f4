"""The table of golden semantics: what each fused operator computes, as plain torch on CPU tensors."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])

_MODULES = (
    "attention",
    "cache",
    "dtype",
    "grouped",
    "layout",
    "moe",
    "norm",
    "quantization",
    "rotary",
    "sampling",
    "collective",
    "atb",
)


@dataclass(frozen=True)
class Golden:
    """What one operator computes.

    Attributes:
        function: takes the operator's arguments by the names of its schema, tensors on the CPU; returns fresh tensors
            for its results (None for one that it leaves empty), and writes into the arguments that it updates.
        native: whether torch_npu's own kernel runs first against the launch recorder; where not, ``reason`` says why.
        reason: why the kernel cannot run.
        launch: the name that a launch is recorded under where the kernel does not run.
        on_device: the function takes the device's own tensors (and first their memory), and returns such.
    """

    function: Callable[..., Any]
    native: bool = True
    reason: str = ""
    launch: str = ""
    on_device: bool = False


GOLDEN: dict[str, Golden] = {}


def golden(
    *operators: str, native: bool = True, reason: str = "", launch: str = "", on_device: bool = False
) -> Callable[[Function], Function]:
    """Register a function as the semantics of operators such as ``npu::npu_rms_norm``."""
    if native == bool(reason):
        raise ValueError("exactly the operators whose kernel cannot run have a reason")

    def register(function: Function) -> Function:
        for operator in operators:
            if operator in GOLDEN:
                raise ValueError(f"{operator} has golden semantics already")
            GOLDEN[operator] = Golden(function, native, reason, launch, on_device)
        return function

    return register


def load_golden() -> dict[str, Golden]:
    """The whole table."""
    for module in _MODULES:
        importlib.import_module(f"npu_zoo.simulator.operators.{module}")
    return GOLDEN
