"""Matrix products in bfloat16 with weights of 8 and 4 bits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from npu_zoo.nn.kernels import cpu_quantized
from npu_zoo.nn.kernels.compiled.binding import ADDRESS, COUNT, SIZE, Function
from npu_zoo.nn.kernels.compiled.linear import as_rows, require_bytes
from npu_zoo.nn.kernels.compiled.memory import allocate
from npu_zoo.nn.kernels.quantized import QuantizedLinearKernel, QuantizedWeight

INPUTS_OF_A_TILE, INPUTS_OF_A_BLOCK = 64, 32
CHANNELS_OF_A_PANEL = 16

_packed_bytes = Function("zoo_packed_code_bytes", SIZE, SIZE, COUNT, result=SIZE)
_pack = Function("zoo_pack_codes", ADDRESS, SIZE, SIZE, SIZE, COUNT, ADDRESS, COUNT)
_linear = Function("zoo_linear_codes", ADDRESS, SIZE, SIZE, ADDRESS, ADDRESS, SIZE, SIZE, SIZE, COUNT, ADDRESS, COUNT)


@dataclass(frozen=True)
class CodePanels:
    """A quantized [channels, inputs] weight in panels of 16 channels; csrc/codes.h has the layout.

    Attributes:
        values: the panels' bytes.
        scales: [panels, groups, 16], float32.
        addresses: of the first byte and the first scale.
        group_size: inputs that share a scale.
        bits: of a code, 8 or 4.
    """

    values: Tensor
    scales: Tensor
    addresses: tuple[int, int]
    channels: int
    inputs: int
    group_size: int
    bits: int


class _PanelCodesLinear:
    """A kernel for codes of some bits; groups that are no multiple of 32 inputs are left to another."""

    otherwise: ClassVar[QuantizedLinearKernel]
    bits: ClassVar[int]

    @classmethod
    def pack(cls, weight: QuantizedWeight) -> CodePanels | Any:
        """See :class:`QuantizedLinearKernel`."""
        if not weight.per_channel and weight.group_size % INPUTS_OF_A_BLOCK:
            return cls.otherwise.pack(weight)
        channels, inputs = weight.codes.shape
        codes = weight.codes.contiguous()
        values = allocate(_packed_bytes(channels, inputs, weight.bits))
        threads = torch.get_num_threads()
        _pack(codes.data_ptr(), codes.stride(0), channels, inputs, weight.bits, values.data_ptr(), threads)
        scales = _scales_by_panel(weight.scale)
        addresses = values.data_ptr(), scales.data_ptr()
        return CodePanels(values, scales, addresses, channels, inputs, weight.group_size, weight.bits)

    @staticmethod
    def packed_parts(packed: CodePanels | Any) -> dict[str, Tensor]:
        """See :func:`npu_zoo.nn.kernels.table.packed_parts`; none of weights that are left to the other kernel."""
        return {"panels": packed.values, "scales": packed.scales} if isinstance(packed, CodePanels) else {}

    @classmethod
    def from_packed_parts(cls, parts: Mapping[str, Tensor], channels: int, inputs: int) -> CodePanels:
        """See :func:`npu_zoo.nn.kernels.table.from_packed_parts`."""
        values = require_bytes(parts, "panels", _packed_bytes(channels, inputs, cls.bits))
        panels = -(-channels // CHANNELS_OF_A_PANEL)
        groups = parts["scales"].shape[1] if "scales" in parts else 0
        scales = require_bytes(parts, "scales", panels * max(1, groups) * CHANNELS_OF_A_PANEL * 4)
        addresses = values.data_ptr(), scales.data_ptr()
        return CodePanels(values, scales, addresses, channels, inputs, inputs // groups, cls.bits)

    @classmethod
    def apply(cls, x: Tensor, packed: CodePanels | Any) -> Tensor:
        """[..., in] to [..., out]."""
        if not isinstance(packed, CodePanels):
            return cls.otherwise.apply(x, packed)
        out = x.new_empty(*x.shape[:-1], packed.channels)
        rows = as_rows(x, packed.inputs, INPUTS_OF_A_TILE)
        _linear(
            rows.data_ptr(),
            rows.stride(0),
            len(rows),
            *packed.addresses,
            packed.channels,
            packed.inputs,
            packed.group_size,
            packed.bits,
            out.data_ptr(),
            torch.get_num_threads(),
        )
        return out


class PanelInt8Linear(_PanelCodesLinear):
    """w8a16 in bfloat16."""

    otherwise = cpu_quantized.WeightOnlyInt8Linear
    bits = 8


class PanelInt4Linear(_PanelCodesLinear):
    """w4a16 in bfloat16."""

    otherwise = cpu_quantized.WeightOnlyInt4Linear
    bits = 4


def _scales_by_panel(scale: Tensor) -> Tensor:
    """[channels, groups] to [panels, groups, 16], filled up with zeros."""
    channels, groups = scale.shape
    filled = F.pad(scale, (0, 0, 0, -channels % CHANNELS_OF_A_PANEL))
    return filled.view(-1, CHANNELS_OF_A_PANEL, groups).transpose(1, 2).contiguous()
