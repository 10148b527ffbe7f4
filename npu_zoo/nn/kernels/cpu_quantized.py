"""Products with quantized weights on CPUs, on the libraries that torch brings; see :mod:`npu_zoo.nn.kernels.quantized`.

For few rows a product reads the codes as they are stored, which takes less time than a plain weight of twice or four
times the bytes. For many rows blocks of output channels are dequantized into one buffer and multiplied by oneDNN.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from npu_zoo.nn.kernels import reference
from npu_zoo.nn.kernels.quantized import QuantizedWeight
from npu_zoo.nn.kernels.reference import StoredCodes, blocks_of

# Up to so many rows reading the codes as they are is faster than dequantizing them first, as measured.
_FEW_ROWS_INT8, _FEW_ROWS_INT4 = 12, 32


@dataclass(frozen=True)
class _Int8Codes:
    """Int8 codes [out, in] and a bfloat16 scale [out]."""

    codes: Tensor
    scale: Tensor


_INT8_INPUTS = 32
"""Torch's operator reads so many inputs at once, beyond the end of a row where there are fewer."""


class WeightOnlyInt8Linear:
    """w8a16 in bfloat16 with a scale per channel; other scales and odd widths are left to the reference."""

    @staticmethod
    def pack(weight: QuantizedWeight) -> _Int8Codes | StoredCodes:
        """See :class:`QuantizedLinearKernel`."""
        if not weight.per_channel or weight.codes.shape[1] % _INT8_INPUTS:
            return reference.store_codes(weight)
        return _Int8Codes(weight.codes.clone(memory_format=torch.contiguous_format), weight.scale[:, 0].bfloat16())

    @staticmethod
    def apply(x: Tensor, packed: _Int8Codes | StoredCodes) -> Tensor:
        """[..., in] to [..., out]."""
        if isinstance(packed, StoredCodes):
            return reference.DequantizedLinear.apply(x, packed)
        rows = x.flatten(0, -2).contiguous()
        if len(rows) <= _FEW_ROWS_INT8:
            product = torch._weight_int8pack_mm(rows, packed.codes, packed.scale)
        else:
            product = _int8_in_blocks(rows, packed.codes).mul_(packed.scale)
        return product.view(*x.shape[:-1], -1)


def _int8_in_blocks(rows: Tensor, codes: Tensor) -> Tensor:
    """``rows @ codes.T``; bfloat16 holds every int8 code exactly, so the scales come last."""
    blocks = blocks_of(*codes.shape)
    buffer = rows.new_empty(blocks[0][1], codes.shape[1])
    product = rows.new_empty(len(rows), len(codes))
    for start, stop in blocks:
        block = buffer[: stop - start].copy_(codes[start:stop])
        product[:, start:stop] = F.linear(rows, block)
    return product


_GROUP_SIZES = (256, 128, 64, 32)
"""Those that torch's operator takes."""


@dataclass(frozen=True)
class _Int4Codes:
    """Codes in the layout of torch's operator.

    Attributes:
        codes: [out, in / 2], uint8: by channels of a block, then inputs, then channels; output channels are padded.
        scales: [in / group_size, out, 2], bfloat16: a scale, and a zero for the middle of the codes.
        out_features: without the padding.
        group_size: one that the operator takes.
    """

    codes: Tensor
    scales: Tensor
    out_features: int
    group_size: int


class WeightOnlyInt4Linear:
    """w4a16 in bfloat16; shapes that torch's operator does not take are left to the reference."""

    @staticmethod
    def pack(weight: QuantizedWeight) -> _Int4Codes | StoredCodes:
        """See :class:`QuantizedLinearKernel`."""
        group_size = next((size for size in _GROUP_SIZES if weight.group_size % size == 0), None)
        channels = _channels_of_a_block()
        if group_size is None or channels is None:
            return reference.store_codes(weight)
        out_features, in_features = weight.codes.shape
        padding = (0, 0, 0, -out_features % channels)
        codes = F.pad(weight.codes.int() + 8, padding, value=8)
        repeats = in_features // group_size // weight.scale.shape[1]
        scale = F.pad(weight.scale, padding).repeat_interleave(repeats, 1).t().bfloat16()
        scales = torch.stack((scale, torch.zeros_like(scale)), -1)
        return _Int4Codes(_to_operator_layout(codes), scales, out_features, group_size)

    @staticmethod
    def apply(x: Tensor, packed: _Int4Codes | StoredCodes) -> Tensor:
        """[..., in] to [..., out]."""
        if isinstance(packed, StoredCodes):
            return reference.DequantizedLinear.apply(x, packed)
        rows = x.flatten(0, -2).contiguous()
        multiply = _int4_product if len(rows) <= _FEW_ROWS_INT4 else _int4_in_blocks
        product = multiply(rows, packed)
        return product[:, : packed.out_features].view(*x.shape[:-1], -1)


def _int4_product(rows: Tensor, packed: _Int4Codes) -> Tensor:
    operator = torch.ops.aten._weight_int4pack_mm_for_cpu
    product: Tensor = operator(rows, packed.codes, packed.group_size, packed.scales)
    return product


def _to_operator_layout(codes: Tensor) -> Tensor:
    """Int32 codes from 0 to 15 [out, in] in the operator's layout: uint8 [out, in / 2]."""
    packed: Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    return packed


@functools.cache
def _channels_of_a_block() -> int | None:
    """Output channels that this CPU's layout keeps together, the first half of them in lower halves of bytes.

    It differs by instruction set and is documented nowhere, so it is looked at; None where it is another one.
    """
    for channels in (64, 32):
        codes = torch.arange(2 * channels * 32, dtype=torch.int32).view(2 * channels, 32) * 7 % 16
        expected = codes.view(2, 2, channels // 2, 32).transpose(-1, -2)  # [block, half, in, channels / 2]
        found = _to_operator_layout(codes).view(2, 32, channels // 2)
        if torch.equal(found, (expected[:, 0] | expected[:, 1] << 4).to(torch.uint8)):
            return channels
    return None


def _int4_in_blocks(rows: Tensor, packed: _Int4Codes) -> Tensor:
    """The product in blocks of channels, each dequantized to [in, channels]."""
    channels, (out_features, in_features) = _channels_of_a_block() or 0, (packed.scales.shape[1], rows.shape[1])
    codes = packed.codes.view(-1, in_features, channels // 2)
    blocks = blocks_of(len(codes), in_features * channels)
    buffer = rows.new_empty(in_features, blocks[0][1], channels)
    product = rows.new_empty(len(rows), out_features)
    for start, stop in blocks:
        block = buffer.view(-1)[: in_features * (stop - start) * channels].view(in_features, stop - start, channels)
        _unpack_into(block, codes[start:stop])
        first, last = start * channels, stop * channels
        scale = packed.scales[:, None, first:last, 0]
        weight = block.view(-1, packed.group_size, last - first).mul_(scale).flatten(0, 1)
        product[:, first:last] = rows @ weight
    return product


def _unpack_into(block: Tensor, codes: Tensor) -> None:
    """Bytes [blocks, in, channels / 2] as codes from -8 to 7 [in, blocks, channels]."""
    half = codes.shape[2]
    block[:, :, :half] = ((codes & 0xF).view(torch.int8) - 8).transpose(0, 1)
    block[:, :, half:] = ((codes >> 4).view(torch.int8) - 8).transpose(0, 1)


@dataclass(frozen=True)
class _OneDnnInt8:
    """Int8 codes in oneDNN's layout, opaque, with their scale and zeros [out]."""

    codes: Tensor
    scale: Tensor
    zeros: Tensor


class DynamicInt8Linear:
    """w8a8 by oneDNN; activations are quantized by token in float32."""

    @staticmethod
    def pack(weight: QuantizedWeight) -> _OneDnnInt8 | StoredCodes:
        """See :class:`QuantizedLinearKernel`."""
        if not _sums_are_exact():
            return reference.store_codes(weight)
        scale = weight.scale[:, 0].clone()
        return _OneDnnInt8(_to_onednn(weight.codes), scale, torch.zeros(len(scale), dtype=torch.int64))

    @staticmethod
    def apply(x: Tensor, packed: _OneDnnInt8 | StoredCodes) -> Tensor:
        """[..., in] to [..., out]."""
        if isinstance(packed, StoredCodes):
            return reference.Int8Linear.apply(x, packed)
        codes, scale = reference.quantize_tokens(x.flatten(0, -2))
        product = _int8_product((codes + _MIDDLE).to(torch.uint8), packed).mul_(scale)
        return product.to(x.dtype).view(*x.shape[:-1], -1)


_MIDDLE = 128
"""What is added to activations' codes, since oneDNN is fast for unsigned ones alone."""


def _to_onednn(codes: Tensor) -> Tensor:
    packed: Tensor = torch.ops.onednn.qlinear_prepack(codes.contiguous(), None)
    return packed


def _int8_product(codes: Tensor, weight: _OneDnnInt8) -> Tensor:
    """Uint8 codes [T, in] less their middle, times the weight with its scales: float32 [T, out]."""
    product: Tensor = torch.ops.onednn.qlinear_pointwise(
        codes, 1.0, _MIDDLE, weight.codes, weight.scale, weight.zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )
    return product


@functools.cache
def _sums_are_exact() -> bool:
    """Whether oneDNN is there and its sums are whole, as they are not where a CPU adds two products in 16 bits."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    weight = torch.full((16, 64), 127, dtype=torch.int8)
    packed = _OneDnnInt8(_to_onednn(weight), torch.ones(16), torch.zeros(16, dtype=torch.int64))
    found = _int8_product(torch.full((1, 64), 255, dtype=torch.uint8), packed)
    return bool((found == 127 * 127 * 64).all())
