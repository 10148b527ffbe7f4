"""Matrix products in bfloat16."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from npu_zoo.core.errors import WeightsError
from npu_zoo.nn.kernels.compiled.binding import ADDRESS, COUNT, SIZE, Function
from npu_zoo.nn.kernels.compiled.elementwise import silu_and_mul
from npu_zoo.nn.kernels.compiled.memory import allocate

CHANNELS_OF_A_PANEL = 16
INPUTS_OF_A_BLOCK = 32
"""Panels hold so many inputs together, and are filled up with zeros."""

_packed_bytes = Function("zoo_packed_bytes", SIZE, SIZE, result=SIZE)
_pack = Function("zoo_pack_linear", ADDRESS, SIZE, SIZE, SIZE, ADDRESS, COUNT)
_linear = Function("zoo_linear", ADDRESS, SIZE, SIZE, ADDRESS, SIZE, SIZE, ADDRESS, COUNT)
_linear_sums = Function("zoo_linear_sums", ADDRESS, SIZE, SIZE, ADDRESS, SIZE, SIZE, ADDRESS, COUNT)
_feed_forward = Function("zoo_feed_forward", ADDRESS, *[SIZE] * 4, *[ADDRESS] * 3, COUNT)


@dataclass(frozen=True)
class Panels:
    """A [channels, inputs] weight in panels of 16 channels; csrc/panels.h has the layout.

    Attributes:
        values: the panels' bytes.
        address: of the first.
    """

    values: Tensor
    address: int
    channels: int
    inputs: int


class PanelLinear:
    """``x @ weight.T`` in bfloat16, summed in float32, with the weight in panels."""

    @staticmethod
    def packs(dtype: torch.dtype) -> bool:
        """Always."""
        return True

    @staticmethod
    def pack(weight: Tensor) -> Panels:
        """The panels of a [out, in] weight."""
        return PanelLinear.pack_parts([weight])

    @staticmethod
    def pack_parts(parts: Sequence[Tensor]) -> Panels:
        """The panels of a weight whose rows lie in several tensors; only the last may end within a panel."""
        if any(len(part) % CHANNELS_OF_A_PANEL for part in parts[:-1]):
            parts = [torch.cat(list(parts))]
        channels, inputs = sum(map(len, parts)), parts[0].shape[1]
        values = allocate(_packed_bytes(channels, inputs))
        address = values.data_ptr()
        for part in parts:
            rows = part if part.stride(1) == 1 else part.contiguous()
            _pack(rows.data_ptr(), rows.stride(0), len(rows), inputs, address, torch.get_num_threads())
            address += _packed_bytes(len(rows), inputs)
        return Panels(values, values.data_ptr(), channels, inputs)

    @staticmethod
    def packed_parts(packed: Panels) -> dict[str, Tensor]:
        """See :func:`npu_zoo.nn.kernels.table.packed_parts`."""
        return {"panels": packed.values}

    @staticmethod
    def from_packed_parts(parts: Mapping[str, Tensor], channels: int, inputs: int) -> Panels:
        """See :func:`npu_zoo.nn.kernels.table.from_packed_parts`."""
        values = require_bytes(parts, "panels", _packed_bytes(channels, inputs))
        return Panels(values, values.data_ptr(), channels, inputs)

    @staticmethod
    def apply(x: Tensor, packed: Panels) -> Tensor:
        """[..., in] to [..., out]."""
        return _multiply(_linear, x, packed, x.dtype)

    @staticmethod
    def apply_in_float32(x: Tensor, packed: Panels) -> Tensor:
        """[..., in] in bfloat16 to [..., out] in float32: the sums as they are. For weights of few channels."""
        return _multiply(_linear_sums, x, packed, torch.float32)

    @staticmethod
    def feed_forward(x: Tensor, gate_up: Panels, down: Panels) -> Tensor:
        """SwiGLU in one call; what is between both products is rounded once, and does not pass through memory twice."""
        if down.inputs % CHANNELS_OF_A_PANEL:
            return PanelLinear.apply(silu_and_mul(PanelLinear.apply(x, gate_up)), down)
        out = x.new_empty(*x.shape[:-1], down.channels)
        rows = as_rows(x, gate_up.inputs)
        _feed_forward(
            rows.data_ptr(),
            rows.stride(0),
            len(rows),
            down.channels,
            down.inputs,
            gate_up.address,
            down.address,
            out.data_ptr(),
            torch.get_num_threads(),
        )
        return out


def require_bytes(parts: Mapping[str, Tensor], name: str, due: int) -> Tensor:
    """A part of a packed weight.

    Raises:
        WeightsError: it is missing, or does not have the bytes that are due.
    """
    if name not in parts or parts[name].nbytes != due:
        found = f"{parts[name].nbytes} bytes of" if name in parts else "no"
        raise WeightsError(f"there are {found} {name}, and {due} bytes were due")
    return parts[name]


def _multiply(function: Function, x: Tensor, packed: Panels, dtype: torch.dtype) -> Tensor:
    out = x.new_empty(*x.shape[:-1], packed.channels, dtype=dtype)
    rows = as_rows(x, packed.inputs)
    function(
        rows.data_ptr(),
        rows.stride(0),
        len(rows),
        packed.address,
        packed.channels,
        packed.inputs,
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out


def as_rows(x: Tensor, inputs: int, block: int = INPUTS_OF_A_BLOCK) -> Tensor:
    """[rows, in], each row contiguous, filled up with zeros to a whole number of blocks of inputs."""
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    if inputs % block:
        return F.pad(rows, (0, -inputs % block))
    return rows if rows.stride(1) == 1 else rows.contiguous()
