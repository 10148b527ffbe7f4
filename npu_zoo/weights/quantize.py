"""Symmetric integer weights: codes and scales of matrices, and how codes are packed into words.

A matrix of [out, in] has a scale per output channel, or per group of neighbouring values of a channel. A scale is the
largest magnitude over the largest code, rounded to the dtype that it is stored in, and codes are computed from it as
stored. A channel or group of zeros has the scale 1 and codes of zero, and touches no other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from npu_zoo.core.errors import UsageError, WeightsError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

WORD_BITS = 32


@dataclass(frozen=True)
class Scheme:
    """How a linear layer's weights and inputs are stored and multiplied.

    Attributes:
        weight_bits: 8 or 4.
        activation_bits: 16 leaves inputs in the run's dtype; 8 quantizes each token's as it comes.
        group_size: values of a channel that share a scale; None where the whole channel does.
    """

    weight_bits: int
    activation_bits: int
    group_size: int | None = None

    @classmethod
    def of(cls, name: str, group_size: int | None = None) -> Scheme:
        """The scheme of a name such as ``w8a16``.

        Raises:
            UsageError: there is none, or groups do not go with it.
        """
        if name not in SCHEMES:
            raise UsageError(f"unknown quantization '{name}'; known: {', '.join(SCHEMES)}")
        weight_bits, activation_bits = SCHEMES[name]
        if group_size is not None and activation_bits == 8:
            raise UsageError(f"{name} takes a scale per output channel; leave --group-size out")
        return cls(weight_bits, activation_bits, group_size)

    @property
    def name(self) -> str:
        """Such as ``w8a16``."""
        return f"w{self.weight_bits}a{self.activation_bits}"

    @property
    def largest_code(self) -> int:
        """127, or 7."""
        return int(2 ** (self.weight_bits - 1)) - 1

    @property
    def codes_per_word(self) -> int:
        """Codes that a 32-bit word holds."""
        return WORD_BITS // self.weight_bits

    @property
    def packs(self) -> bool:
        """Whether codes are kept in words; those of w8a8 are multiplied as they are."""
        return self.activation_bits == 16

    def num_groups(self, columns: int) -> int:
        """Scales of one output channel."""
        return columns // self.group_size if self.group_size else 1


SCHEMES: dict[str, tuple[int, int]] = {"w8a16": (8, 16), "w4a16": (4, 16), "w8a8": (8, 8)}
"""Bits of weights and of activations, by name."""


def check_width(name: str, columns: int, scheme: Scheme) -> None:
    """Refuse a matrix whose channels do not divide into groups.

    Raises:
        WeightsError: names the tensor and both sizes.
    """
    if scheme.group_size and columns % scheme.group_size:
        raise WeightsError(
            f"tensor {name} has {columns} input values a channel, which groups of {scheme.group_size} do not divide; "
            "choose another --group-size, or leave it out for a scale per channel"
        )


def quantize_rows(values: Tensor, scheme: Scheme, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Codes and scales of some output channels, independent of all other channels.

    Args:
        values: [rows, columns], floating.

    Returns:
        int8 codes [rows, columns] in the range of the scheme, and scales [rows, groups].
    """
    import torch

    grouped = values.float().view(len(values), scheme.num_groups(values.shape[1]), -1)
    low, high = grouped.aminmax(dim=-1)
    largest = torch.maximum(high, -low)
    scales = (largest / scheme.largest_code).to(scale_dtype)
    # A magnitude so small that its scale rounds to nothing is a zero too.
    scales = torch.where((scales == 0) | (largest == 0), torch.ones_like(scales), scales)
    codes = (grouped / scales.float().unsqueeze(-1)).round_()
    codes.clamp_(-scheme.largest_code - 1, scheme.largest_code)
    return codes.to(torch.int8).view(values.shape), scales


def dequantize_rows(codes: Tensor, scales: Tensor) -> Tensor:
    """float32 [rows, columns] of :func:`quantize_rows`'s codes and scales."""
    grouped = codes.float().view(len(codes), scales.shape[1], -1)
    return (grouped * scales.float().unsqueeze(-1)).view(codes.shape)


def pack_rows(codes: Tensor, bits: int) -> Tensor:
    """Codes in words: int8 [rows, columns] to int32 [rows, words], code j of a word in bits j * ``bits`` on.

    A code is stored as itself plus half of the range; the last word of a row is filled up with zero codes. This is the
    layout of compressed-tensors' ``pack-quantized``.
    """
    import torch

    per_word = WORD_BITS // bits
    filled = torch.nn.functional.pad(codes, (0, -codes.shape[1] % per_word))
    offset = (filled.to(torch.int32) + (1 << (bits - 1))).view(len(codes), -1, per_word)
    packed = torch.zeros(offset.shape[:2], dtype=torch.int32)
    for place in range(per_word):
        packed |= offset[..., place] << (place * bits)
    return packed


def unpack_rows(packed: Tensor, bits: int, columns: int) -> Tensor:
    """The int8 codes [rows, columns] of :func:`pack_rows`."""
    import torch

    places = torch.arange(0, WORD_BITS, bits, dtype=torch.int32)
    codes = (packed.unsqueeze(-1) >> places) & ((1 << bits) - 1)
    return (codes.flatten(1)[:, :columns] - (1 << (bits - 1))).to(torch.int8)


def dequantize_blocks(values: Tensor, scales: Tensor, block: tuple[int, int]) -> Tensor:
    """float32 of float8 rows with a scale per block (config.json's ``quant_method`` fp8).

    Args:
        values: [rows, columns] of float8, beginning at a block's first row.
        scales: [blocks of rows, blocks of columns], what the values are multiplied by.
        block: rows and columns of a block.
    """
    rows, columns = values.shape
    wide = scales.float().repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :columns]
    return values.float() * wide
