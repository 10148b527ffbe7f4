"""Normalisations and gated activations."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from npu_zoo.simulator.errors import NoSemantics
from npu_zoo.simulator.golden import golden
from npu_zoo.simulator.operators.quantization import dtype_of, dynamic_codes, quantize_rows

STANDARD, INTERLEAVED, HALVES = 0, 1, 2
"""Kinds of swiglu: of halves; of every other element with limits; of halves with limits."""

DYNAMIC = 1


def rms(x: torch.Tensor, gamma: torch.Tensor, epsilon: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Root-mean-square norm over the dimensions of ``gamma``, computed in float32; also the reciprocal root."""
    dims = tuple(range(x.dim() - gamma.dim(), x.dim()))
    wide = x.float()
    rstd = torch.rsqrt(wide.square().mean(dims, keepdim=True) + epsilon)
    return (wide * rstd * gamma.float()).to(x.dtype), rstd


@golden("npu::npu_rms_norm")
def npu_rms_norm(input: torch.Tensor, gamma: torch.Tensor, epsilon: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Source: op-plugin, （beta）torch_npu-npu_rms_norm.md."""
    return rms(input, gamma, epsilon)


@golden("npu::npu_gemma_rms_norm")
def npu_gemma_rms_norm(input: torch.Tensor, gamma: torch.Tensor, epsilon: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The weight counts from one. Source: op-plugin, test_npu_gemma_rms_norm.py."""
    return rms(input, gamma.float() + 1, epsilon)


@golden("npu::npu_add_rms_norm")
def npu_add_rms_norm(
    x1: torch.Tensor, x2: torch.Tensor, gamma: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The norm of a sum; the third result is the sum. Source: op-plugin, torch_npu-npu_add_rms_norm.md."""
    total = (x1.float() + x2.float()).to(x1.dtype)
    normed, rstd = rms(total, gamma, epsilon)
    return normed, rstd, total


@golden("npu::npu_add_rms_norm_quant")
def npu_add_rms_norm_quant(
    x1: torch.Tensor,
    x2: torch.Tensor,
    gamma: torch.Tensor,
    scales1: torch.Tensor,
    zero_points1: torch.Tensor | None = None,
    beta: torch.Tensor | None = None,
    scales2: torch.Tensor | None = None,
    zero_points2: torch.Tensor | None = None,
    axis: int = -1,
    epsilon: float = 1e-6,
    div_mode: bool = True,
    dst_type: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """The norm of a sum as int8 codes, by one or two sets of scales; the third result is the sum.

    Source: op-plugin, torch_npu-npu_add_rms_norm_quant.md.
    """
    if dtype_of("npu_add_rms_norm_quant", dst_type, torch.int8) is not torch.int8:
        raise NoSemantics(f"npu_add_rms_norm_quant: argument dst_type={dst_type} has no golden semantics")
    if scales2 is None and zero_points2 is not None:
        raise NoSemantics("npu_add_rms_norm_quant: argument zero_points2 without scales2 has no golden semantics")
    normed, total = _normed_sum(x1, x2, gamma, beta, epsilon)

    def codes(scales: torch.Tensor, zero_points: torch.Tensor | None) -> torch.Tensor:
        scaled = normed / scales.float() if div_mode else normed * scales.float()
        shifted = scaled if zero_points is None else scaled + zero_points.float()
        return shifted.round().clamp(-128, 127).to(torch.int8)

    return codes(scales1, zero_points1), None if scales2 is None else codes(scales2, zero_points2), total


@golden("npu::npu_add_rms_norm_dynamic_quant")
def npu_add_rms_norm_dynamic_quant(
    x1: torch.Tensor,
    x2: torch.Tensor,
    gamma: torch.Tensor,
    smooth_scale1: torch.Tensor | None = None,
    smooth_scale2: torch.Tensor | None = None,
    beta: torch.Tensor | None = None,
    epsilon: float = 1e-6,
    output_mask: Sequence[bool] | None = None,
    y_dtype: int | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """The norm of a sum as codes with a scale per row, once or twice; the third result is the sum.

    Source: op-plugin, torch_npu-npu_add_rms_norm_dynamic_quant.md.
    """
    normed, total = _normed_sum(x1, x2, gamma, beta, epsilon)
    both = smooth_scale1 is not None and smooth_scale2 is not None

    def codes(smooth: torch.Tensor | None, wanted: bool) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        if not wanted:
            return None, None
        smoothed = normed if smooth is None else normed * smooth.float()
        return dynamic_codes("npu_add_rms_norm_dynamic_quant", smoothed, y_dtype)

    first, second = (True, both) if output_mask is None else output_mask
    y1, scale1 = codes(smooth_scale1, first)
    y2, scale2 = codes(smooth_scale2, second)
    return y1, y2, total, scale1, scale2


def _normed_sum(
    x1: torch.Tensor, x2: torch.Tensor, gamma: torch.Tensor, beta: torch.Tensor | None, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The norm of a sum in float32, and the sum in the dtype of its addends."""
    total = x1.float() + x2.float()
    normed = rms(total, gamma, epsilon)[0]
    return (normed if beta is None else normed + beta.float()), total.to(x1.dtype)


@golden("npu::npu_silu")
def npu_silu(input: torch.Tensor) -> torch.Tensor:
    """Source: op-plugin, （beta）torch_npu-npu_silu.md."""
    return torch.nn.functional.silu(input.float()).to(input.dtype)


@golden("npu::npu_silu_")
def npu_silu_in_place(input: torch.Tensor) -> torch.Tensor:
    """Source: op-plugin, （beta）torch_npu-npu_silu.md."""
    return input.copy_(npu_silu(input))


@golden("npu::fast_gelu", "npu::npu_fast_gelu")
def npu_fast_gelu(input: torch.Tensor) -> torch.Tensor:
    """``x * sigmoid(1.702 x)``. Source: op-plugin, test_fast_gelu.py, whose figures it gives."""
    wide = input.float()
    return (wide * (1.702 * wide).sigmoid()).to(input.dtype)


@golden("npu::npu_swiglu")
def npu_swiglu(input: torch.Tensor, dim: int) -> torch.Tensor:
    """``silu(a) * b`` of the two halves. Source: op-plugin, （beta）torch_npu-npu_swiglu.md."""
    gate, up = input.float().chunk(2, dim)
    return (torch.nn.functional.silu(gate) * up).to(input.dtype)


@golden("npu::npu_dequant_swiglu_quant")
def npu_dequant_swiglu_quant(
    x: torch.Tensor,
    weight_scale: torch.Tensor | None = None,
    activation_scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    quant_scale: torch.Tensor | None = None,
    quant_offset: torch.Tensor | None = None,
    group_index: torch.Tensor | None = None,
    activate_left: bool = False,
    quant_mode: int = 0,
    dst_type: int | None = None,
    round_mode: int | None = None,
    activate_dim: int | None = None,
    swiglu_mode: int = STANDARD,
    clamp_limit: float = 7.0,
    glu_alpha: float = 1.702,
    glu_bias: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums of int8 products are scaled back, gated and quantised row by row. Rows of no group are zero.

    Source: op-plugin, torch_npu-npu_dequant_swiglu_quant.md. How it quantises with given scales is not modelled: the
    page multiplies by them, test_npu_dequant_swiglu_quant.py divides.
    """
    if quant_mode != DYNAMIC or any(value is not None for value in (quant_offset, dst_type, round_mode, activate_dim)):
        raise NoSemantics(
            "npu_dequant_swiglu_quant: only quant_mode=1 without quant_offset, dst_type, round_mode and activate_dim "
            "has golden semantics"
        )
    rows = x.flatten(0, -2)
    groups = _group_of_rows(rows.shape[0], group_index)
    wide = _scaled_back(rows[: len(groups)], groups, weight_scale, activation_scale, bias)
    gate, up = _gate_and_up(wide, activate_left=activate_left, swiglu_mode=swiglu_mode)
    if swiglu_mode == STANDARD:
        gated = torch.nn.functional.silu(gate) * up
    else:
        gate, up = gate.clamp(max=clamp_limit), up.clamp(-clamp_limit, clamp_limit)
        gated = gate * (glu_alpha * gate).sigmoid() * (up + glu_bias)
    if quant_scale is not None:
        gated = gated * quant_scale.float().view(-1, gated.shape[-1])[groups]
    output = torch.zeros(*x.shape[:-1], x.shape[-1] // 2, dtype=torch.int8)
    scale = torch.zeros(x.shape[:-1])
    output.flatten(0, -2)[: len(groups)], scale.flatten()[: len(groups)] = quantize_rows(gated)
    return output, scale


def _group_of_rows(rows: int, counts: torch.Tensor | None) -> torch.Tensor:
    """The group that each row belongs to; shorter than the rows where the last of them belong to none."""
    if counts is None:
        return torch.zeros(rows, dtype=torch.int64)
    return torch.arange(len(counts)).repeat_interleave(counts)


def _scaled_back(
    x: torch.Tensor,
    groups: torch.Tensor,
    weight_scale: torch.Tensor | None,
    activation_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    if x.dtype is not torch.int32:
        if any(value is not None for value in (weight_scale, activation_scale, bias)):
            raise NoSemantics("npu_dequant_swiglu_quant: scales and bias of a float x have no golden semantics")
        return x.float()
    if bias is not None and bias.dtype is not torch.int32:
        raise NoSemantics(f"npu_dequant_swiglu_quant: argument bias of {bias.dtype} has no golden semantics")
    wide = (x if bias is None else x + bias.view(-1, x.shape[-1])[groups]).float()
    if weight_scale is not None:
        wide = wide * weight_scale.float().view(-1, x.shape[-1])[groups]
    return wide if activation_scale is None else wide * activation_scale.float().view(-1, 1)[: len(wide)]


def _gate_and_up(x: torch.Tensor, *, activate_left: bool, swiglu_mode: int) -> tuple[torch.Tensor, torch.Tensor]:
    if swiglu_mode == INTERLEAVED:
        return x[..., 0::2], x[..., 1::2]
    left, right = x.chunk(2, -1)
    return (left, right) if activate_left else (right, left)
