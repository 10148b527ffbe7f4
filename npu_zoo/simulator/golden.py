"""The table of golden semantics: what each fused operator computes, as plain torch on CPU tensors."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

Function = TypeVar("Function", bound=Callable[..., Any])

_MODULES = (
    "attention",
    "cache",
    "dtype",
    "expert_parallel",
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


NO_LAUNCH = "-"


@dataclass(frozen=True)
class Golden:
    """What one operator computes.

    Attributes:
        function: takes the operator's arguments by the names of its schema, tensors on the CPU; returns fresh tensors
            for its results (None for one that it leaves empty), and writes into the arguments that it updates.
        native: whether torch_npu's own kernel runs first against the launch recorder; where not, ``reason`` says why.
        reason: why the kernel cannot run.
        launch: the name that a launch is recorded under where the kernel does not run; NO_LAUNCH for what only asks.
        on_device: the function takes the device's own tensors (and first their memory), and returns such.
    """

    function: Callable[..., Any]
    native: bool = True
    reason: str = ""
    launch: str = ""
    on_device: bool = False


class Fitted:
    """A result whose size the documents leave open: the kernel's output decides, and what is over stays zero.

    Args:
        candidates: values; that of the output's size is taken, or else the start of the first.
    """

    def __init__(self, *candidates: torch.Tensor | None) -> None:
        self._candidates = [candidate for candidate in candidates if candidate is not None]

    def write(self, output: torch.Tensor) -> None:
        """Fill an output."""
        output.zero_()
        flat = output.view(-1)
        fitting = [candidate for candidate in self._candidates if candidate.numel() == flat.numel()]
        for candidate in (fitting or self._candidates)[:1]:
            values = candidate.reshape(-1)[: flat.numel()]
            flat[: values.numel()] = values.to(output.dtype)


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
