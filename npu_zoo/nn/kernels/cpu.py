"""Kernels for CPUs, on the libraries that torch brings."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# oneDNN lays a weight out for an expected number of rows; of those measured, this one serves 1 to 64 rows best.
_EXPECTED_ROWS = 32


class PackedLinear:
    """``x @ weight.T`` with the weight in oneDNN's blocked layout.

    A plain weight is laid out anew inside every call, which costs more than the product itself for few rows.
    """

    @staticmethod
    def packs(dtype: torch.dtype) -> bool:
        """Not where torch has no oneDNN, nor where this CPU has no instructions for the dtype."""
        available = bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]
        return available and (dtype != torch.bfloat16 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()))

    @staticmethod
    def pack(weight: Tensor) -> Tensor:
        """An opaque oneDNN tensor, or the weight itself where :meth:`packs` says so."""
        if not PackedLinear.packs(weight.dtype):
            return weight
        packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, _EXPECTED_ROWS)
        return packed

    @staticmethod
    def apply(x: Tensor, packed: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        if not packed.is_mkldnn:
            return F.linear(x, packed)
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")
        return product


def rotary_embedding(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """As the reference, written into the result at once instead of through five temporaries."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return _rotate(query, cos, sin), _rotate(key, cos, sin)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    rotated = torch.empty_like(x, memory_format=torch.contiguous_format)
    (first, second), (out_first, out_second) = x.chunk(2, dim=-1), rotated.chunk(2, dim=-1)
    torch.mul(first, cos, out=out_first).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=out_second).addcmul_(first, sin)
    return rotated


def silu_and_mul(x: Tensor) -> Tensor:
    """As the reference, with one temporary less."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)
