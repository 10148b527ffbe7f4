"""Quantized linear layers: what a checkpoint stores of them, and which layers of a model they are."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from npu_zoo.core.errors import PluginError, WeightsError
from npu_zoo.core.quantization import QuantizationConfig, scheme_operations
from npu_zoo.nn.kernels.quantized import QuantizedLinearKernel, QuantizedWeight
from npu_zoo.nn.kernels.table import ExpertsKernel, Kernels
from npu_zoo.registry import load_code

_WORD_BITS = 32
_SHAPE = "weight_shape"


class WeightMethod(ABC):
    """How a checkpoint stores a quantized weight. A :class:`QuantizationSpec` names a subclass."""

    def __init__(self, config: QuantizationConfig) -> None:
        self.config = config

    @abstractmethod
    def tensors(self, rows: int, in_features: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of each tensor of a [rows, in_features] weight, by its name behind the layer's.

        The first dimension counts rows, so that stacked weights are stored one after the other, except of
        ``weight_shape``, which each of them has its own of. Where ranks share the inputs, each has its part of the
        second dimension of those tensors whose shape depends on ``in_features``.
        """

    @abstractmethod
    def weight(self, tensors: Mapping[str, Tensor], in_features: int, dtype: torch.dtype) -> QuantizedWeight:
        """The weight that loaded tensors hold; it may share their memory.

        Raises:
            WeightsError: they contradict each other.
        """

    def groups(self, in_features: int) -> int:
        """Scales of an output channel.

        Raises:
            WeightsError: groups do not divide the inputs.
        """
        size = self.config.group_size or in_features
        if in_features % size:
            raise WeightsError(f"its groups of {size} inputs do not divide its {in_features} inputs")
        return in_features // size


class Int8Weights(WeightMethod):
    """``weight``: int8 codes [rows, in_features]; ``weight_scale``: [rows, 1]."""

    def tensors(self, rows: int, in_features: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """See :meth:`WeightMethod.tensors`."""
        return {
            "weight": ((rows, in_features), torch.int8),
            "weight_scale": ((rows, self.groups(in_features)), torch.float32),
        }

    def weight(self, tensors: Mapping[str, Tensor], in_features: int, dtype: torch.dtype) -> QuantizedWeight:
        """See :meth:`WeightMethod.weight`."""
        return QuantizedWeight(tensors["weight"], tensors["weight_scale"], self.config.weight_bits, dtype)


class PackedWeights(WeightMethod):
    """``weight_packed``: int32 words of codes, ``weight_scale``: [rows, groups], ``weight_shape``: the two sizes.

    A word holds its codes from the lowest bits on, each with half their range added; the last one of a row is padded.
    """

    def tensors(self, rows: int, in_features: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """See :meth:`WeightMethod.tensors`."""
        words = -(-in_features * self.config.weight_bits // _WORD_BITS)
        return {
            "weight_packed": ((rows, words), torch.int32),
            "weight_scale": ((rows, self.groups(in_features)), torch.float32),
            _SHAPE: ((2,), torch.int64),
        }

    def weight(self, tensors: Mapping[str, Tensor], in_features: int, dtype: torch.dtype) -> QuantizedWeight:
        """See :meth:`WeightMethod.weight`."""
        bits, packed = self.config.weight_bits, tensors["weight_packed"].view(torch.int8)
        codes = _unpack_halves(packed) if bits == 4 else packed ^ -128
        return QuantizedWeight(codes[:, :in_features], tensors["weight_scale"], bits, dtype)


def _unpack_halves(packed: Tensor) -> Tensor:
    """Int8 bytes of two codes with 8 added, [rows, n], as their codes [rows, 2 * n]."""
    return torch.stack(((packed & 0xF) - 8, (packed >> 4 & 0xF) - 8), -1).flatten(1)


@dataclass(frozen=True)
class Quantization:
    """A run's quantization: how weights are stored, and what multiplies with them.

    ``experts`` is None where no kernel is registered for them, and the model has none.
    """

    config: QuantizationConfig
    method: WeightMethod
    linear: QuantizedLinearKernel
    experts: ExpertsKernel | None


def bind_quantization(
    config: QuantizationConfig, method: str, kernels: Kernels, *, has_experts: bool = True
) -> Quantization:
    """Import what was chosen.

    Args:
        config: the checkpoint's.
        method: the code reference of a :class:`WeightMethod`.
        kernels: those of the run.
        has_experts: whether the model has experts; otherwise nothing needs to multiply them.

    Raises:
        PluginError: the method cannot be imported, or its operations have no kernel.
    """
    linear, experts = scheme_operations(config.scheme)
    missing = [name for name in (linear, experts)[: 2 if has_experts else 1] if name not in kernels.more]
    if missing:
        raise PluginError(f"no plugin registers a kernel for {', '.join(missing)}, which {config.scheme} takes")
    read = cast("WeightMethod", load_code(method)(config))
    return Quantization(config, read, kernels.more[linear], kernels.more.get(experts))


def stacked_shape(name: str, shape: tuple[int, ...], parts: int) -> tuple[int, ...]:
    """The shape of a tensor of several stacked weights, of the shape that it has for all of their rows."""
    return (parts, *shape) if name == _SHAPE else shape


def split_parts(name: str, tensor: Tensor, rows: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Each stacked weight's own part of a tensor."""
    return tensor.unbind(0) if name == _SHAPE else torch.split(tensor, list(rows))


def require_shapes(stated: Tensor, rows: Mapping[str, int], in_features: int) -> None:
    """Compare the shapes that stacked weights state, [parts, 2], with the model's.

    Raises:
        WeightsError: one of them is another.
    """
    for (part, due), found in zip(rows.items(), stated.tolist(), strict=True):
        if found != [due, in_features]:
            raise WeightsError(f"{part}.{_SHAPE} says {found}, and this model has {[due, in_features]} there")
