"""Quantised products and what makes their operands."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from npu_zoo.simulator.errors import NoSemantics
from npu_zoo.simulator.golden import golden

INT8_MAX, INT4_MAX = 127, 7
QUINT4X2 = 16
"""torch's number of the dtype that stands for int4: eight codes in an int32."""

_FP19 = 0xFFFFE000
"""The bits of a float32 that the output stage of a product keeps of a scale."""

_OFFSET_SHIFT, _OFFSET_BITS, _IS_PACKED = 37, 0x1FF, 1 << 46
_TORCH_DTYPES = {
    0: torch.uint8,
    1: torch.int8,
    3: torch.int32,
    5: torch.float16,
    6: torch.float32,
    12: torch.int8,
    13: torch.uint8,
    15: torch.bfloat16,
}
"""torch's numbers of dtypes, which operators take as ``output_dtype``."""


def dtype_of(operator: str, number: int | torch.dtype | None, default: torch.dtype) -> torch.dtype:
    """The dtype that an ``output_dtype`` argument names.

    Raises:
        NoSemantics: it is one that torch does not have.
    """
    if number is None or isinstance(number, torch.dtype):
        return number or default
    if number not in _TORCH_DTYPES:
        raise NoSemantics(f"{operator}: the dtype of number {number} has no golden semantics")
    return _TORCH_DTYPES[number]


def quantize_rows(x: torch.Tensor, largest: int = INT8_MAX) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric codes of each row in int8, and a float32 scale per row: ``max|x| / largest``."""
    wide = x.float()
    scales = wide.abs().amax(-1) / largest
    codes = wide / torch.where(scales == 0, 1.0, scales)[..., None]
    return codes.round().clamp(-largest - 1, largest).to(torch.int8), scales


def dynamic_codes(operator: str, x: torch.Tensor, number: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes with a scale per row in the dtype of that number: int8 (also where none is given) or packed int4."""
    if number == QUINT4X2:
        codes, scales = quantize_rows(x, INT4_MAX)
        return pack_int4(codes), scales
    if dtype_of(operator, number, torch.int8) is not torch.int8:
        raise NoSemantics(f"{operator}: only int8 and packed int4 codes have golden semantics")
    return quantize_rows(x)


def unpack_int4(packed: torch.Tensor) -> torch.Tensor:
    """Codes from -8 to 7, eight of each int32 along the last dimension, the lowest bits first."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    codes = (packed[..., None] >> shifts) & 0xF
    return torch.where(codes > 7, codes - 16, codes).flatten(-2).to(torch.int8)


def pack_int4(codes: torch.Tensor) -> torch.Tensor:
    """The inverse of :func:`unpack_int4`."""
    grouped = codes.to(torch.int64).view(*codes.shape[:-1], -1, 8) & 0xF
    packed = (grouped << torch.arange(0, 32, 4)).sum(-1)
    return torch.where(packed > 0x7FFFFFFF, packed - (1 << 32), packed).to(torch.int32)


def integer_codes(weight: torch.Tensor) -> torch.Tensor:
    """int8 codes as they are, int32 as eight int4 codes each, along the dimension that is contiguous."""
    if weight.dtype is not torch.int32:
        return weight
    if _is_transposed(weight):
        return unpack_int4(weight.transpose(-1, -2)).transpose(-1, -2)
    return unpack_int4(weight)


def _is_transposed(weight: torch.Tensor) -> bool:
    rows, columns = weight.shape[-2:] if weight.dim() > 1 else (1, 1)
    return (rows, columns) != (1, 1) and weight.stride()[-2:] == (1, rows)


def dequantized(
    weight: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor | None, group_size: int = 0
) -> torch.Tensor:
    """A weight [..., K, N] in float32, ``(w + offset) * scale``; per column, or per group of rows [..., K/g, N].

    Args:
        weight: int8 codes, or packed int4.
        scale: [N], [1] or [..., K/g, N].
        offset: as the scale.
        group_size: rows of a group, the last of which may be shorter; 0 divides them evenly.
    """
    wide = integer_codes(weight).float()
    depth = wide.shape[-2]
    rows = group_size or depth // (scale.shape[-2] if scale.dim() >= wide.dim() else 1)

    def spread(values: torch.Tensor) -> torch.Tensor:
        values = values.float()
        if values.dim() < wide.dim():
            return values if values.numel() == 1 else values.unsqueeze(-2)
        return values.repeat_interleave(rows, -2)[..., :depth, :] if values.shape[-2] > 1 else values

    if offset is not None:
        wide = wide + spread(offset)
    return wide * spread(scale)


@golden("npu::npu_dynamic_quant")
def npu_dynamic_quant(
    input: torch.Tensor,
    smooth_scales: torch.Tensor | None = None,
    group_index: torch.Tensor | None = None,
    dst_type: int | None = None,
    quant_mode: str = "pertoken",
    dst_type_max: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and a scale per token; groups of rows have smooth scales of their own, up to cumulative ends.

    Source: op-plugin, torch_npu-npu_dynamic_quant.md.
    """
    if quant_mode != "pertoken" or dst_type_max:
        raise NoSemantics("npu_dynamic_quant: only quant_mode='pertoken' without dst_type_max has golden semantics")
    wide = input.float()
    if smooth_scales is not None:
        smooth = smooth_scales.float()
        if group_index is not None:
            rows = group_index.diff(prepend=group_index.new_zeros(1))
            smooth = smooth.repeat_interleave(rows, 0).view(input.shape)
        wide = wide * smooth
    return dynamic_codes("npu_dynamic_quant", wide, dst_type)


@golden("npu::npu_quantize")
def npu_quantize(
    input: torch.Tensor,
    scales: torch.Tensor,
    zero_points: torch.Tensor | None,
    dtype: int,
    axis: int = 1,
    div_mode: bool = True,
) -> torch.Tensor:
    """``round(x / scale) + zero point`` (``x * scale`` without div_mode). Source: op-plugin, npu_quantize."""
    target = dtype_of("npu_quantize", dtype, torch.int8)
    shape = [1] * input.dim()
    shape[axis] = -1
    step = scales.float().view(shape) if scales.numel() > 1 else scales.float()
    wide = (input.float() / step if div_mode else input.float() * step).round()
    if zero_points is not None:
        wide = wide + (zero_points.float().view(shape) if zero_points.numel() > 1 else zero_points.float())
    bounds = torch.iinfo(target)
    return wide.clamp(bounds.min, bounds.max).to(target)


@golden("npu::npu_trans_quant_param")
def npu_trans_quant_param(scale: torch.Tensor, offset: torch.Tensor | None = None, round_mode: int = 0) -> torch.Tensor:
    """The upper 19 bits of float32 scales, and 9 bits of offsets, in int64.

    Source: op-plugin, torch_npu-npu_trans_quant_param.md.
    """
    bits = scale.float().view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    if round_mode:  # to the nearest, ties to even
        bits = bits + 0xFFF + ((bits >> 13) & 1)
    packed = (bits & _FP19) | _IS_PACKED
    if offset is None:
        return packed
    return packed | ((offset.float().round().clamp(-256, 255).to(torch.int64) & _OFFSET_BITS) << _OFFSET_SHIFT)


def scale_values(scale: torch.Tensor) -> torch.Tensor:
    """Scales in float32, also of those that :func:`npu_trans_quant_param` has packed."""
    if scale.dtype is torch.int64:
        return (scale & _FP19).to(torch.int32).view(torch.float32)
    return scale.float()


def packed_offsets(scale: torch.Tensor) -> torch.Tensor:
    """The offsets that :func:`npu_trans_quant_param` has packed beside the scales."""
    bits = (scale >> _OFFSET_SHIFT) & _OFFSET_BITS
    return torch.where(bits > 255, bits - 512, bits)


@golden("npu::npu_quant_matmul")
def npu_quant_matmul(
    x1: torch.Tensor,
    x2: torch.Tensor,
    scale: torch.Tensor,
    offset: torch.Tensor | None = None,
    pertoken_scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    output_dtype: int | None = None,
    **unsupported: object,
) -> torch.Tensor:
    """int8 by int8 in int32, times the scales; an int32 result is the sums alone.

    Where no scale of tokens is given torch_npu packs the scales, which costs their lower bits.

    Source: op-plugin, torch_npu-npu_quant_matmul.md and QuantMatmulKernelNpuOpApi.cpp; for int32 vllm-ascend,
    vllm_ascend/ops/fused_moe/shared_experts.py, which scales the result itself.
    """
    given = {name for name, value in unsupported.items() if value is not None}
    if given or (scale.dim() > 1 and scale.shape[0] > 1):
        raise NoSemantics(f"npu_quant_matmul: arguments {sorted(given) or 'scale of groups'} have no golden semantics")
    target = dtype_of("npu_quant_matmul", output_dtype, torch.int8)
    total = integer_codes(x1).double() @ integer_codes(x2).double()
    if bias is not None and bias.dtype is torch.int32:
        total = total + bias.double()
    if target is torch.int32:
        return total.to(target)
    if scale.dtype is torch.float32 and pertoken_scale is None and target is not torch.bfloat16:
        scale, offset = npu_trans_quant_param(scale, offset), None
    result = total * scale_values(scale).double()
    if pertoken_scale is not None:
        result = result * pertoken_scale.double()[..., None]
    if bias is not None and bias.dtype is not torch.int32:
        result = result + bias.double()
    if target is not torch.int8:
        return result.to(target)
    if scale.dtype is torch.int64:
        result = result + packed_offsets(scale)
    return (result if offset is None else result + offset.double()).round().clamp(-128, INT8_MAX).to(torch.int8)


@golden("npu::npu_weight_quant_batchmatmul")
def npu_weight_quant_batchmatmul(
    x: torch.Tensor,
    weight: torch.Tensor,
    antiquant_scale: torch.Tensor,
    antiquant_offset: torch.Tensor | None = None,
    quant_scale: torch.Tensor | None = None,
    quant_offset: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    antiquant_group_size: int = 0,
    inner_precise: int = 0,
    weight_dtype: int | None = None,
) -> torch.Tensor:
    """``x @ ((w + offset) * scale) + bias``. Source: op-plugin, torch_npu-npu_weight_quant_batchmatmul.md."""
    if quant_scale is not None or quant_offset is not None or weight_dtype is not None:
        raise NoSemantics("npu_weight_quant_batchmatmul: a quantised output has no golden semantics")
    if antiquant_scale.dtype is torch.int64:
        raise NoSemantics("npu_weight_quant_batchmatmul: argument antiquant_scale of int64 has no golden semantics")
    product = x.float() @ dequantized(weight, antiquant_scale, antiquant_offset, antiquant_group_size)
    return (product if bias is None else product + bias.float()).to(x.dtype)


@golden("npu::npu_convert_weight_to_int4pack")
def npu_convert_weight_to_int4pack(weight: torch.Tensor, inner_k_tiles: int = 0) -> torch.Tensor:
    """int32 codes [K, N] as [K, N/8]. Source: op-plugin, torch_npu-npu_convert_weight_to_int4pack.md."""
    return pack_int4(weight)


@golden("npu::npu_transpose_batchmatmul")
def npu_transpose_batchmatmul(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    perm_x1: Sequence[int] | None = None,
    perm_x2: Sequence[int] | None = None,
    perm_y: Sequence[int] | None = None,
    batch_split_factor: int = 1,
) -> torch.Tensor:
    """A batched product between permutations. Source: op-plugin, torch_npu-npu_transpose_batchmatmul.md."""
    if bias is not None or scale is not None or batch_split_factor not in (0, 1):
        raise NoSemantics("npu_transpose_batchmatmul: bias, scale and a split batch have no golden semantics")
    left = input.permute(*perm_x1) if perm_x1 else input
    right = weight.permute(*perm_x2) if perm_x2 else weight
    return (left.float() @ right.float()).permute(*(perm_y or (1, 0, 2))).to(input.dtype)


@golden("npu::npu_linear")
def npu_linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``x @ w^T + bias``. Source: op-plugin, （beta）torch_npu-npu_linear.md."""
    if not input.is_floating_point():
        raise NoSemantics(f"npu_linear: argument input of {input.dtype} has no golden semantics")
    product = input.float() @ weight.float().t()
    return (product if bias is None else product + bias.float()).to(input.dtype)


@golden("npu::npu_bmmV2")
def npu_bmm_v2(input: torch.Tensor, mat2: torch.Tensor, output_sizes: Sequence[int]) -> torch.Tensor:
    """A batched product. Source: op-plugin, （beta）torch_npu-npu_bmmV2.md."""
    if output_sizes or input.dim() < 2 or mat2.dim() < 2 or not input.is_floating_point():
        raise NoSemantics("npu_bmmV2: output_sizes, vectors and integers have no golden semantics")
    return (input.float() @ mat2.float()).to(input.dtype)
