"""Kernels for CPUs, on the libraries that torch brings."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from npu_zoo.nn.kernels.recording import depends_on_values
from npu_zoo.nn.kernels.table import Product, Stored

# oneDNN lays a weight out for an expected number of rows; of those measured, this one serves 1 to 64 rows best.
_EXPECTED_ROWS = 32
# Up to this many rows, summing a matrix's rows anew for each takes less time than a batch of small products.
_FEW_ROWS = 4


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
    first, second = x.chunk(2, dim=-1)
    return _turn(first, second, cos, sin)


def _turn(first: Tensor, second: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    rotated = first.new_empty(*first.shape[:-1], 2 * first.shape[-1])
    out_first, out_second = rotated.chunk(2, dim=-1)
    torch.mul(first, cos, out=out_first).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=out_second).addcmul_(first, sin)
    return rotated


def interleaved_rotary_embedding(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As the reference, written into the result at once; halves are made contiguous first, which vectorizes."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return _turn(x[..., 0::2].contiguous(), x[..., 1::2].contiguous(), cos, sin)


def head_linear(x: Tensor, weight: Tensor) -> Tensor:
    """As the reference; for few rows as weighted sums of the matrices' rows, which torch computes at memory speed."""
    num_tokens, num_heads, width = x.shape
    if num_tokens > _FEW_ROWS:
        return torch.bmm(x.transpose(0, 1), weight).transpose(0, 1)
    rows = torch.arange(num_heads * width).repeat(num_tokens)
    bags = torch.arange(0, len(rows), width)
    table, scales = weight.flatten(0, 1), x.reshape(-1)
    return F.embedding_bag(rows, table, bags, mode="sum", per_sample_weights=scales).view(num_tokens, num_heads, -1)


def silu_and_mul(x: Tensor) -> Tensor:
    """As the reference, with one temporary less."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def experts(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    gate_up: Sequence[Stored],
    down: Sequence[Stored],
    linear: Product,
    silu_and_mul: Callable[[Tensor], Tensor],
    elsewhere: bool = False,
) -> Tensor:
    """As the reference, with the tokens sorted by expert once instead of sought for each."""
    depends_on_values()
    if len(x) == 1 and not elsewhere:
        hit = ids[0].tolist()
        outputs = [linear.apply(silu_and_mul(linear.apply(x, gate_up[expert])), down[expert]) for expert in hit]
        return (weights @ torch.cat(outputs).float()).to(x.dtype)
    flat = ids.flatten()
    order = flat.argsort(stable=True)  # [T * top_k], where each expert's tokens stand together
    counts = flat.bincount(minlength=len(gate_up) + elsewhere).tolist()
    tokens, scales = order.div(ids.shape[1], rounding_mode="floor"), weights.flatten()[order].unsqueeze(1)
    total = torch.zeros(x.shape, dtype=torch.float32)
    for expert, (rows, scale) in enumerate(zip(torch.split(tokens, counts), torch.split(scales, counts), strict=True)):
        if len(rows) and expert < len(gate_up):
            output = linear.apply(silu_and_mul(linear.apply(x.index_select(0, rows), gate_up[expert])), down[expert])
            total.index_add_(0, rows, output * scale)
    return total.to(x.dtype)


def top_k_top_p(logits: Tensor, top_k: Sequence[int], top_p: Sequence[float]) -> Tensor:
    """As the reference, a row at a time, with numpy's sort, which compares vectors of values at once."""
    cut = torch.empty_like(logits)
    for row, kept, k, p in zip(logits, cut, top_k, top_p, strict=True):
        # What is above the next smaller number is not below the least; a mask of booleans takes ten times as long.
        beyond = np.nextafter(_least(row, k, p), np.float32(-np.inf))
        torch.threshold(row, float(beyond), -torch.inf, out=kept)
    return cut


def _least(row: Tensor, top_k: int, top_p: float) -> np.float32:
    """The least logit of a row that is kept."""
    size, values = len(row), row.numpy()
    kept = min(top_k or size, size)
    least: np.float32
    if top_p >= 1.0:
        least = np.float32(-np.inf) if kept == size else np.partition(values, size - kept)[size - kept]
        return least
    ordered = torch.from_numpy(np.sort(values)[size - kept :]).flip(0)
    weights = torch.exp(ordered - ordered[0])
    sums = weights.cumsum(0, dtype=torch.float64)
    before = (sums - weights).numpy()
    within = int(np.searchsorted(before, top_p * float(sums[-1])))  # tokens before whose turn less was kept
    least = ordered.numpy()[max(within, 1) - 1]
    return least
