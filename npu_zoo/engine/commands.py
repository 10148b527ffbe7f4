"""What the first rank tells the others to do."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from npu_zoo.engine.speculation.steps import SeenStep
from npu_zoo.engine.step import StepRow


@dataclass(frozen=True)
class Execute:
    """Compute a step."""

    rows: tuple[StepRow, ...]


@dataclass(frozen=True)
class ComputeLogits:
    """Take hidden states to logits, where the head is.

    Attributes:
        hidden: the bytes of ``rows`` rows; as bytes, since what pickles a tensor depends on the device's library.
    """

    hidden: bytes
    rows: int

    @classmethod
    def of(cls, hidden: Tensor) -> ComputeLogits:
        """From [rows, hidden_size]."""
        return cls(hidden.cpu().contiguous().view(torch.uint8).numpy().tobytes(), len(hidden))

    def tensor(self, dtype: torch.dtype) -> Tensor:
        """The [rows, hidden_size], on the host."""
        return torch.frombuffer(bytearray(self.hidden), dtype=dtype).view(self.rows, -1)


@dataclass(frozen=True)
class Draft:
    """Let the layer that predicts further tokens see steps, and guess what follows rows of the last one."""

    steps: tuple[SeenStep, ...]


@dataclass(frozen=True)
class Report:
    """Tell what the rank holds."""


Command = Execute | ComputeLogits | Draft | Report
