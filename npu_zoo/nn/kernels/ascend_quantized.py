"""Products with quantized weights by torch_npu's fused operators; see :mod:`npu_zoo.nn.kernels.quantized`.

Sources: the operators' pages in Ascend/op-plugin, and how vllm-ascend calls them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch_npu
from torch import Tensor

from npu_zoo.core.errors import HardwareError
from npu_zoo.nn.kernels.ascend import FRACTAL_NZ, combine, combine_held, sort_by_expert
from npu_zoo.nn.kernels.quantized import QuantizedWeight
from npu_zoo.nn.kernels.table import Product

_GROUP_MULTIPLE = 32
_LARGEST = 65535
_INT4_MULTIPLE = 8
"""Codes of a word, which is how int4 is handed over."""


@dataclass(frozen=True)
class AscendCodes:
    """A weight as the operators take it, once its codes are transposed.

    Attributes:
        codes: [out, in] int8, or [out, in / 8] int32 of eight int4 codes each.
        scale: [out], or [out, groups], in the dtype of the activations; of w8a8 in float16, float32.
        group_size: inputs that share a scale; 0 where an output channel has one.
        offset: zeros like the scale, where an operator of the field's is called with them.
    """

    codes: Tensor
    scale: Tensor
    group_size: int = 0
    offset: Tensor | None = None


def _require_groups(in_features: int, group_size: int | None) -> None:
    """What npu_weight_quant_batchmatmul says of ``antiquant_group_size``."""
    if group_size is not None and (group_size % _GROUP_MULTIPLE or not _GROUP_MULTIPLE <= group_size < in_features):
        raise HardwareError(
            f"groups of {group_size} inputs; npu_weight_quant_batchmatmul takes multiples of {_GROUP_MULTIPLE} below "
            f"the {in_features} inputs, or one scale per output channel; quantize the checkpoint so"
        )


def _require_size(out_features: int, in_features: int) -> None:
    if max(out_features, in_features) > _LARGEST:
        raise HardwareError(f"the operators for quantized products take sizes up to {_LARGEST}; use a plain checkpoint")


class _WeightOnlyLinear:
    """w8a16 and w4a16 by npu_weight_quant_batchmatmul; the weight is transposed, as its page recommends."""

    def require(self, out_features: int, in_features: int, group_size: int | None) -> None:
        """See :class:`QuantizedLinearKernel`."""
        _require_size(out_features, in_features)
        _require_groups(in_features, group_size)

    def pack(self, weight: QuantizedWeight) -> AscendCodes:
        """See :class:`QuantizedLinearKernel`."""
        scale = weight.scale.to(weight.dtype, copy=True)
        if weight.per_channel:
            scale = scale.squeeze(1)
        group_size = 0 if weight.per_channel else weight.group_size
        return AscendCodes(self.codes(weight.codes), scale, group_size, torch.zeros_like(scale))

    @staticmethod
    def codes(codes: Tensor) -> Tensor:
        """A copy of int8 codes [out, in] as the operator takes them."""
        return codes.clone(memory_format=torch.contiguous_format)

    def apply(self, x: Tensor, packed: AscendCodes) -> Tensor:
        """[T, in] to [T, out]."""
        product: Tensor = torch_npu.npu_weight_quant_batchmatmul(
            x, packed.codes.t(), packed.scale.t(), antiquant_group_size=packed.group_size
        )
        return product

    def apply_parts(self, x: Tensor, packed: AscendCodes, rows: tuple[int, ...]) -> tuple[Tensor, ...]:
        """[T, in] to [T, rows] of each part, each contiguous: a product, and a copy of each part of it.

        Parts of the weight would not do: torch_npu takes a slice of packed int4 codes for one that is not transposed.
        """
        return tuple(part.contiguous() for part in torch.split(self.apply(x, packed), list(rows), -1))


def _split(packed: AscendCodes, rows: tuple[int, ...]) -> list[AscendCodes]:
    parts = zip(torch.split(packed.codes, list(rows)), torch.split(packed.scale, list(rows)), strict=True)
    return [AscendCodes(codes, scale, packed.group_size) for codes, scale in parts]


def _zeros(packed: AscendCodes) -> Tensor:
    return torch.zeros_like(packed.scale) if packed.offset is None else packed.offset


class WeightOnlyInt8Linear(_WeightOnlyLinear):
    """w8a16."""

    def apply_parts(self, x: Tensor, packed: AscendCodes, rows: tuple[int, ...]) -> tuple[Tensor, ...]:
        """As the others do, but in one launch where npu_grouped_matmul takes the scales: those per channel."""
        if packed.group_size:
            return super().apply_parts(x, packed, rows)
        parts = _split(packed, rows)
        return tuple(
            torch_npu.npu_grouped_matmul(
                x=[x] * len(rows),
                weight=[part.codes.t() for part in parts],
                antiquant_scale=[part.scale for part in parts],
                antiquant_offset=list(torch.split(_zeros(packed), list(rows))),
                split_item=0,
                group_type=-1,
            )
        )


class WeightOnlyInt4Linear(_WeightOnlyLinear):
    """w4a16."""

    def require(self, out_features: int, in_features: int, group_size: int | None) -> None:
        """See :class:`QuantizedLinearKernel`."""
        super().require(out_features, in_features, group_size)
        if in_features % _INT4_MULTIPLE:
            raise HardwareError(
                f"npu_convert_weight_to_int4pack takes rows of a multiple of {_INT4_MULTIPLE} codes, and these have "
                f"{in_features}; use a checkpoint in w8a16"
            )

    @staticmethod
    def codes(codes: Tensor) -> Tensor:
        """See :meth:`_WeightOnlyLinear.codes`."""
        packed: Tensor = torch_npu.npu_convert_weight_to_int4pack(codes.int().contiguous())
        return packed


class _DynamicInt8:
    """w8a8: activations quantized by token (npu_dynamic_quant), then npu_quant_matmul."""

    def require(self, out_features: int, in_features: int, group_size: int | None) -> None:
        """See :class:`QuantizedLinearKernel`."""
        _require_size(out_features, in_features)

    def pack(self, weight: QuantizedWeight) -> AscendCodes:
        """See :class:`QuantizedLinearKernel`."""
        # npu_grouped_matmul has scales in bfloat16 for results in bfloat16, and npu_quant_matmul takes both.
        dtype = torch.bfloat16 if weight.dtype is torch.bfloat16 else torch.float32
        scale = weight.scale.squeeze(1).to(dtype, copy=True)
        return AscendCodes(weight.codes.clone(memory_format=torch.contiguous_format), scale)

    def apply(self, x: Tensor, packed: AscendCodes) -> Tensor:
        """[T, in] to [T, out]."""
        codes, token_scale = torch_npu.npu_dynamic_quant(x)
        product: Tensor = torch_npu.npu_quant_matmul(
            codes, packed.codes.t(), packed.scale, pertoken_scale=token_scale, output_dtype=x.dtype
        )
        return product


class DynamicInt8Linear(_DynamicInt8):
    """w8a8 on 910B."""

    def apply_parts(self, x: Tensor, packed: AscendCodes, rows: tuple[int, ...]) -> tuple[Tensor, ...]:
        """[T, in] to [T, rows] of each part, each contiguous: a product for each of them, of the same codes."""
        codes, token_scale = torch_npu.npu_dynamic_quant(x)
        return tuple(
            torch_npu.npu_quant_matmul(
                codes, part.codes.t(), part.scale, pertoken_scale=token_scale, output_dtype=x.dtype
            )
            for part in _split(packed, rows)
        )


class FractalInt8Linear(_DynamicInt8):
    """w8a8 on 310P: the weight in FRACTAL_NZ, which has to be transposed there; parts are slices of one product."""

    def pack(self, weight: QuantizedWeight) -> AscendCodes:
        """See :class:`QuantizedLinearKernel`."""
        stored = super().pack(weight)
        torch.npu.config.allow_internal_format = True  # type: ignore[attr-defined]
        return AscendCodes(torch_npu.npu_format_cast(stored.codes, FRACTAL_NZ), stored.scale)


class _Experts(ABC):
    """See :func:`reference.experts`; the experts' quantized weights stacked, for any number of tokens and experts."""

    @abstractmethod
    def stack(self, weights: Sequence[AscendCodes]) -> AscendCodes:
        """Experts' weights as one, by expert first."""

    @abstractmethod
    def grouped(self, x: Tensor, weight: AscendCodes, counts: Tensor) -> Tensor:
        """Rows sorted by expert [T * top_k, in], of which each expert has so many, to [T * top_k, out]."""

    def __call__(
        self,
        x: Tensor,
        ids: Tensor,
        weights: Tensor,
        gate_up: Sequence[AscendCodes] | AscendCodes,
        down: Sequence[AscendCodes] | AscendCodes,
        linear: Product,
        silu_and_mul: Callable[[Tensor], Tensor],
        elsewhere: bool = False,
    ) -> Tensor:
        """[T, hidden] to [T, hidden]."""
        if not isinstance(gate_up, AscendCodes) or not isinstance(down, AscendCodes):
            gate_up, down = self.stack(list(gate_up)), self.stack(list(down))  # type: ignore[arg-type]
        rows, places, counts = sort_by_expert(x, ids, len(gate_up.codes), elsewhere=elsewhere)
        outputs = self.grouped(silu_and_mul(self.grouped(rows, gate_up, counts)), down, counts)
        if elsewhere:
            return combine_held(outputs, places, counts, weights.masked_fill(ids == len(gate_up.codes), 0))
        return combine(outputs, places, weights)


def _stacked(codes: list[Tensor], weights: Sequence[AscendCodes]) -> AscendCodes:
    """Codes by expert, with scales [E, out] or [E, groups, out]."""
    scale = torch.stack([weight.scale.t() for weight in weights])
    return AscendCodes(torch.stack(codes), scale, weights[0].group_size, torch.zeros_like(scale))


class WeightOnlyInt8Experts(_Experts):
    """w8a16 by npu_grouped_matmul, which takes int8 weights with a scale per channel alone."""

    def stack(self, weights: Sequence[AscendCodes]) -> AscendCodes:
        """[E, out, in] codes; see :class:`_Experts`."""
        return _stacked([weight.codes for weight in weights], weights)

    def require(self, out_features: int, in_features: int, group_size: int | None) -> None:
        """See :class:`QuantizedLinearKernel`."""
        if group_size is not None:
            raise HardwareError(
                f"groups of {group_size} inputs; npu_grouped_matmul takes int8 experts with one scale per output "
                "channel alone; quantize the checkpoint so, or in w4a16"
            )

    def grouped(self, x: Tensor, weight: AscendCodes, counts: Tensor) -> Tensor:
        """See :class:`_Experts`."""
        return _grouped_weight_only(x, weight.codes.transpose(1, 2), weight, counts)


class WeightOnlyInt4Experts(_Experts):
    """w4a16 by npu_grouped_matmul; codes are packed along the outputs, as the field does."""

    def require(self, out_features: int, in_features: int, group_size: int | None) -> None:
        """See :class:`QuantizedLinearKernel`."""
        if out_features % _INT4_MULTIPLE:
            raise HardwareError(
                f"experts with {out_features} outputs; npu_grouped_matmul takes multiples of {_INT4_MULTIPLE} in w4a16"
            )

    def stack(self, weights: Sequence[AscendCodes]) -> AscendCodes:
        """[E, in, out / 8] codes; see :class:`_Experts`."""
        return _stacked([_repacked(weight.codes) for weight in weights], weights)

    def grouped(self, x: Tensor, weight: AscendCodes, counts: Tensor) -> Tensor:
        """See :class:`_Experts`."""
        return _grouped_weight_only(x, weight.codes, weight, counts)


def _repacked(packed: Tensor) -> Tensor:
    """Int4 codes [out, in / 8] as [in, out / 8]."""
    codes = torch.stack([packed << shift >> 28 for shift in range(28, -1, -4)], -1).flatten(1)
    turned: Tensor = torch_npu.npu_convert_weight_to_int4pack(codes.t().contiguous())
    return turned


def _grouped_weight_only(x: Tensor, codes: Tensor, weight: AscendCodes, counts: Tensor) -> Tensor:
    product: Tensor = torch_npu.npu_grouped_matmul(
        x=[x],
        weight=[codes],
        antiquant_scale=[weight.scale],
        antiquant_offset=[_zeros(weight)],
        split_item=2,
        group_type=0,
        group_list_type=1,
        group_list=counts,
    )[0]
    return product


class DynamicInt8Experts(_Experts):
    """w8a8: rows quantized by token before each of both products."""

    def stack(self, weights: Sequence[AscendCodes]) -> AscendCodes:
        """[E, out, in] codes; see :class:`_Experts`."""
        return _stacked([weight.codes for weight in weights], weights)

    def grouped(self, x: Tensor, weight: AscendCodes, counts: Tensor) -> Tensor:
        """See :class:`_Experts`."""
        codes, token_scale = torch_npu.npu_dynamic_quant(x)
        product: Tensor = torch_npu.npu_grouped_matmul(
            x=[codes],
            weight=[weight.codes.transpose(1, 2)],
            scale=[weight.scale],
            per_token_scale=[token_scale],
            split_item=2,
            group_type=0,
            group_list_type=1,
            group_list=counts,
            output_dtype=x.dtype,
        )[0]
        return product


linear_w8a16, linear_w4a16, linear_w8a8 = WeightOnlyInt8Linear(), WeightOnlyInt4Linear(), DynamicInt8Linear()
fractal_linear_w8a8 = FractalInt8Linear()
experts_w8a16, experts_w4a16, experts_w8a8 = WeightOnlyInt8Experts(), WeightOnlyInt4Experts(), DynamicInt8Experts()
