"""Rotary position embedding and its scaling."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from npu_zoo.core.errors import WeightsError
from npu_zoo.core.model_config import ModelConfig, RopeScaling
from npu_zoo.nn.context import BuildContext


class RotaryEmbedding(nn.Module):
    """Tables of cosines and sines for every position of the run.

    Angles are computed in float32 and stored in the model's dtype, as transformers does.
    """

    def __init__(self, config: ModelConfig, context: BuildContext) -> None:
        super().__init__()
        self._shape = (context.max_model_len, config.head_dim, config.rope_theta, config.rope_scaling)
        self._dtype = context.dtype
        self._tables: tuple[Tensor, Tensor] | None = None
        check_scaling(config.rope_scaling)

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines of [T] positions, [T, head_dim / 2] each."""
        if self._tables is None or self._tables[0].device != positions.device:
            self._tables = self._build(positions.device)
        cos, sin = self._tables
        return cos.index_select(0, positions), sin.index_select(0, positions)

    def _build(self, device: torch.device) -> tuple[Tensor, Tensor]:
        length, head_dim, theta, scaling = self._shape
        angles = torch.outer(torch.arange(length).float(), inverse_frequencies(head_dim, theta, scaling))
        return angles.cos().to(device, self._dtype), angles.sin().to(device, self._dtype)


def check_scaling(scaling: RopeScaling) -> None:
    """Refuse a scaling that this version does not know.

    Raises:
        WeightsError: it is none of none, linear.
    """
    if scaling.kind not in ("none", "linear"):
        raise WeightsError(f"the checkpoint uses {scaling.kind} rope scaling; this version has: none, linear")


def inverse_frequencies(head_dim: int, theta: float, scaling: RopeScaling) -> Tensor:
    """[head_dim / 2] radians per position, in float32.

    ``linear`` divides positions by the factor (position interpolation, arXiv:2306.15595; MindFormers' "PI").

    Raises:
        WeightsError: see :func:`check_scaling`.
    """
    check_scaling(scaling)
    frequencies = 1.0 / (theta ** (torch.arange(0, head_dim, 2).float() / head_dim))
    return frequencies / scaling.factor if scaling.kind == "linear" else frequencies
