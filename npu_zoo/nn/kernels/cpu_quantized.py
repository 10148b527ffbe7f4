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
_FEW_ROWS_INT8, _FEW_ROWS_INT4, _FEW_ROWS_HALVES = 12, 96, 32

_BLOCK_VALUES = 1 << 21
"""Int4 codes that are dequantized at once."""


@dataclass(frozen=True)
class _Int8Codes:
    """Int8 codes [out, in] and a bfloat16 scale [out]."""

    codes: Tensor
    scale: Tensor


_INT8_INPUTS = 32
"""Torch's operator reads so many inputs at once, beyond the end of a row where there are fewer."""


class WeightOnlyInt8Linear:
    """w8a16 in bfloat16; shapes that torch's operators do not take are left to the reference.

    Torch's int8 operator takes a scale per channel. Codes with scales by group are the int4 operator's, in two halves:
    16 times the upper four bits, and the lower ones, of inputs that are given twice.
    """

    @staticmethod
    def pack(weight: QuantizedWeight) -> _Int8Codes | _Int4Codes | StoredCodes:
        """See :class:`QuantizedLinearKernel`."""
        if not weight.per_channel:
            return _pack_halves(weight) if _fits_int4(weight) else reference.store_codes(weight)
        if weight.codes.shape[1] % _INT8_INPUTS:
            return reference.store_codes(weight)
        return _Int8Codes(weight.codes.clone(memory_format=torch.contiguous_format), weight.scale[:, 0].bfloat16())

    @staticmethod
    def apply(x: Tensor, packed: _Int8Codes | _Int4Codes | StoredCodes) -> Tensor:
        """[..., in] to [..., out]."""
        if isinstance(packed, StoredCodes):
            return reference.DequantizedLinear.apply(x, packed)
        if isinstance(packed, _Int4Codes):
            return _multiply_int4(x, packed, _FEW_ROWS_HALVES)
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
        scales: [in / group_size, out, 2], bfloat16: a scale, and what the middle of the codes stands for.
        out_features: without the padding.
        group_size: one that the operator takes.
        halves: whether they are the halves of int8 codes, the upper ones of all inputs first.
    """

    codes: Tensor
    scales: Tensor
    out_features: int
    group_size: int
    halves: bool = False


class WeightOnlyInt4Linear:
    """w4a16 in bfloat16; shapes that torch's operator does not take are left to the reference."""

    @staticmethod
    def pack(weight: QuantizedWeight) -> _Int4Codes | StoredCodes:
        """See :class:`QuantizedLinearKernel`."""
        if not _fits_int4(weight):
            return reference.store_codes(weight)
        scale = _scales_of(weight)
        return _pack_int4(weight.codes, torch.stack((scale, torch.zeros_like(scale)), -1))

    @staticmethod
    def apply(x: Tensor, packed: _Int4Codes | StoredCodes) -> Tensor:
        """[..., in] to [..., out]."""
        if isinstance(packed, StoredCodes):
            return reference.DequantizedLinear.apply(x, packed)
        return _multiply_int4(x, packed, _FEW_ROWS_INT4)


def _fits_int4(weight: QuantizedWeight) -> bool:
    return _channels_of_a_block() is not None and weight.group_size % _GROUP_SIZES[-1] == 0


def _scales_of(weight: QuantizedWeight) -> Tensor:
    """[in / group_size, out], each scale as often as the operator's groups go into the weight's."""
    size = next(size for size in _GROUP_SIZES if weight.group_size % size == 0)
    return weight.scale.repeat_interleave(weight.group_size // size, 1).t().bfloat16()


def _pack_int4(codes: Tensor, scales: Tensor, *, halves: bool = False) -> _Int4Codes:
    """Int8 codes of 4 bits [out, in] and scales [in / group_size, out, 2] as the operator takes them."""
    (out_features, in_features), channels = codes.shape, _channels_of_a_block() or 1
    scales = F.pad(scales, (0, 0, 0, -out_features % channels))
    packed = _packed_in_blocks(codes, channels)
    return _Int4Codes(packed, scales, out_features, in_features // len(scales), halves)


def _pack_halves(weight: QuantizedWeight) -> _Int4Codes:
    """Int8 codes as ``16 * upper + lower + 8``, both halves from -8 to 7."""
    scale, zero = _scales_of(weight), torch.zeros(())
    halves = torch.cat((weight.codes >> 4, (weight.codes & 0xF) - 8), 1)
    upper = torch.stack((16 * scale, zero.expand_as(scale)), -1)
    lower = torch.stack((scale, 8 * scale), -1)
    return _pack_int4(halves, torch.cat((upper, lower)).bfloat16(), halves=True)


def _multiply_int4(x: Tensor, packed: _Int4Codes, few_rows: int) -> Tensor:
    rows = x.flatten(0, -2).contiguous()
    if len(rows) > few_rows:
        product = _int4_in_blocks(rows, packed)
    else:
        given = torch.cat((rows, rows), 1) if packed.halves else rows
        product = torch.ops.aten._weight_int4pack_mm_for_cpu(given, packed.codes, packed.group_size, packed.scales)
    return product[:, : packed.out_features].view(*x.shape[:-1], -1)


def _packed_in_blocks(codes: Tensor, channels: int) -> Tensor:
    """Int8 codes in the operator's layout; it takes four bytes a code, so they are brought there in blocks."""
    out_features, in_features = codes.shape
    blocks = -(-out_features // channels)
    packed = torch.empty(blocks * channels, in_features // 2, dtype=torch.uint8)
    for first, last in blocks_of(blocks, in_features * channels, least=1):
        part = codes[first * channels : last * channels].int().add_(8)
        part = F.pad(part, (0, 0, 0, (last - first) * channels - len(part)), value=8)
        packed[first * channels : last * channels] = _to_operator_layout(part)
    return packed


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
    """The product in blocks of channels, each dequantized to [channels, in]."""
    channels, inputs = _channels_of_a_block() or 1, packed.codes.shape[1] * 2
    codes = packed.codes.view(-1, inputs, channels // 2)
    # Of halves the lower ones have the weight's own scales.
    scales = packed.scales[-(rows.shape[1] // packed.group_size) :, :, 0].t().unsqueeze(-1)
    product = rows.new_empty(len(rows), len(scales))
    size = max(1, _BLOCK_VALUES // (inputs * channels))
    unpacked = torch.empty(size, channels, inputs, dtype=torch.int8)
    buffer = rows.new_empty(size * channels, rows.shape[1])
    for part, first in zip(torch.split(codes, size), range(0, len(scales), size * channels), strict=True):
        last = first + len(part) * channels
        block = buffer[: last - first].copy_(_unpack(part, unpacked[: len(part)], halves=packed.halves))
        block.view(len(block), -1, packed.group_size).mul_(scales[first:last])
        product[:, first:last] = F.linear(rows, block)
    return product


def _unpack(codes: Tensor, unpacked: Tensor, *, halves: bool) -> Tensor:
    """Bytes [blocks, in, channels / 2] as int8 codes [blocks * channels, in], by way of [blocks, channels, in]."""
    half = codes.shape[2]
    unpacked[:, :half] = (codes & 0xF).view(torch.int8).sub_(8).transpose(1, 2)
    unpacked[:, half:] = (codes >> 4).view(torch.int8).sub_(8).transpose(1, 2)
    rows = unpacked.flatten(0, 1)
    if not halves:
        return rows
    upper, lower = rows.chunk(2, 1)
    return upper.mul(16).add_(lower).add_(8)  # which wraps around and back


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
