"""Norm layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from npu_zoo.nn.context import BuildContext
from npu_zoo.nn.layer import Layer


class RMSNorm(Layer):
    """Root-mean-square norm, with the addition to the residual stream where one is given."""

    def __init__(self, hidden_size: int, eps: float, context: BuildContext) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(hidden_size, dtype=context.dtype), requires_grad=False)
        self._eps = eps
        self._kernels = context.kernels

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The norm of ``x`` plus the residual, and that sum; [T, hidden_size] each."""
        if residual is None:
            return self._kernels.rms_norm(x, self.weight, self._eps), x
        return self._kernels.add_rms_norm(x, residual, self.weight, self._eps)
