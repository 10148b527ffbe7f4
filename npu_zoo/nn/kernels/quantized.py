"""What quantized linear layers hand to their kernels, and the interface of those kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight as codes and scales: ``weight[o, i] = codes[o, i] * scale[o, i // group_size]``.

    The codes of 4 bits have a byte each here, on their way from the checkpoint's layout into a kernel's own.

    Attributes:
        codes: [out, in], int8.
        scale: [out, groups], float32; one group where each output channel has one scale.
        bits: of a code, 8 or 4.
        dtype: of the activations.
    """

    codes: Tensor
    scale: Tensor
    bits: int
    dtype: torch.dtype

    @property
    def group_size(self) -> int:
        """Inputs that share a scale."""
        return self.codes.shape[1] // self.scale.shape[1]

    @property
    def per_channel(self) -> bool:
        """Whether an output channel has one scale."""
        return self.scale.shape[1] == 1


class QuantizedLinearKernel(Protocol):
    """A product with a quantized weight; see :class:`npu_zoo.nn.kernels.reference.DequantizedLinear`.

    A kernel whose operators do not take every shape has ``require(out_features, in_features, group_size)``, which
    raises HardwareError before anything is read; ``group_size`` is None where there is a scale per channel. One that
    gives the parts of a stacked weight apart has ``apply_parts``, as linear kernels do.
    """

    def pack(self, weight: QuantizedWeight) -> Any:
        """The stored form: a copy, since what it is given is overwritten by the next layer."""

    def apply(self, x: Tensor, packed: Any) -> Tensor:
        """[..., in] to [..., out], in the dtype of ``x``."""


def pack_nibbles(codes: Tensor) -> Tensor:
    """Int8 codes of 4 bits, two to a byte, the even one in its lower half: [out, in] to [out, ceil(in / 2)], uint8."""
    even, odd = codes[:, 0::2], codes[:, 1::2]
    packed = even & 0xF
    packed[:, : odd.shape[1]] |= odd << 4
    return packed.view(torch.uint8)


def unpack_nibbles(packed: Tensor, in_features: int) -> Tensor:
    """The inverse of :func:`pack_nibbles`: int8 [out, in_features]."""
    pairs = packed.view(torch.int8).unsqueeze(-1)
    return torch.cat(((pairs << 4) >> 4, pairs >> 4), -1).flatten(1)[:, :in_features]
