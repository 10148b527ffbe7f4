"""Kernels for any device and for CPUs, and what they are tested with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from npu_zoo.nn.kernels.quantized import QuantizedWeight

_BLOCK_VALUES = 1 << 20
"""Codes that are multiplied at once, so that they stay in a core's cache."""


def head_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Each head's root-mean-square norm, in float32, rounded before the weight as transformers' Qwen3RMSNorm does.

    Args:
        x: [T, heads, head_dim]; heads need not lie one after the other.
        weight: [head_dim].
        eps: added to the mean of squares.

    Returns:
        [T, heads, head_dim] in the dtype of ``x``, which is left as it is.
    """
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def fused_head_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See :func:`head_rms_norm`; torch's own operator, which rounds once, after the weight."""
    return F.rms_norm(x, weight.shape, weight, eps)


def head_norm_inputs(rows: int, dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor, float]:
    """Arguments of :func:`head_rms_norm`: heads that are part of a wider projection, as in the model."""
    generator = torch.Generator().manual_seed(seed)
    projected = torch.randn(rows, 6, 128, generator=generator).to(dtype)
    return projected[:, :4], 1 + 0.1 * torch.randn(128, generator=generator).to(dtype), 1e-6


@dataclass(frozen=True)
class RowCodes:
    """Int8 codes [out, in] and a float32 scale [out]."""

    codes: Tensor
    scale: Tensor


class DequantizedRows:
    """``x @ (codes * scale).T`` with the whole weight restored in each call."""

    @staticmethod
    def pack(weight: QuantizedWeight) -> RowCodes:
        """A copy of the weight."""
        return RowCodes(weight.codes.clone(), weight.scale[:, 0].clone())

    @staticmethod
    def apply(x: Tensor, packed: RowCodes) -> Tensor:
        """[..., in] to [..., out]."""
        return F.linear(x, (packed.codes * packed.scale.unsqueeze(1)).to(x.dtype))


class ScaledProduct(DequantizedRows):
    """``(x @ codes.T) * scale``: floats hold every code, so weights are scaled as results, and no weight is restored.

    Half precision would overflow before the scale, so float16 is multiplied in float32.
    """

    @staticmethod
    def apply(x: Tensor, packed: RowCodes) -> Tensor:
        """[..., in] to [..., out]."""
        rows = x.float() if x.dtype is torch.float16 else x
        block = max(1, _BLOCK_VALUES // packed.codes.shape[1])
        products = [F.linear(rows, codes.to(rows.dtype)) for codes in torch.split(packed.codes, block)]
        return (torch.cat(products, -1) * packed.scale).to(x.dtype)


def linear_inputs(rows: int, dtype: torch.dtype, seed: int) -> tuple[Tensor, QuantizedWeight]:
    """An input, and a weight with both ends of its codes' range and a row of zeros."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-128, 128, (40, 48), dtype=torch.int8, generator=generator)
    codes[0, 0], codes[-1, -1], codes[1] = -128, 127, 0
    scale = (torch.rand(40, 1, generator=generator) + 0.1) / 127
    x = torch.randn(rows, 48, generator=generator).to(dtype)
    return x, QuantizedWeight(codes, scale, 8, dtype)
