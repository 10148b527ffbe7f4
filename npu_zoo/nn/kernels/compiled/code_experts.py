"""Routed experts with weights of 8 and 4 bits, in bfloat16."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from npu_zoo.nn.kernels import cpu
from npu_zoo.nn.kernels.compiled.binding import ADDRESS, COUNT, SIZE, Function
from npu_zoo.nn.kernels.compiled.linear import as_rows
from npu_zoo.nn.kernels.compiled.quantized import CHANNELS_OF_A_PANEL, INPUTS_OF_A_TILE, CodePanels
from npu_zoo.nn.kernels.table import Product, Stored

FEW_TOKENS = 32
"""Above, one product after the other pays, which widen codes once for all rows."""

_experts = Function(
    "zoo_code_experts",
    *(ADDRESS, SIZE, SIZE, SIZE, SIZE, ADDRESS, ADDRESS, SIZE, *[ADDRESS] * 4, *[SIZE] * 4, COUNT, ADDRESS, COUNT),
)


@dataclass(frozen=True)
class StackedCodes:
    """Experts' quantized weights, of one shape all, and behind them that of the shared experts where there is one.

    Attributes:
        weights: of the routed experts.
        shared: the weight of the shared experts; None where they are computed apart.
        places: int64 [2, weights], addresses of codes and of scales.
        addresses: of both rows of those.
    """

    weights: Sequence[CodePanels]
    shared: CodePanels | None
    places: Tensor
    addresses: tuple[int, int]

    @classmethod
    def of(cls, weights: Sequence[CodePanels], shared: CodePanels | None = None) -> StackedCodes:
        """The stack of some experts' weights."""
        every = [*weights, shared] if shared is not None else weights
        places = torch.tensor([weight.addresses for weight in every]).t().contiguous()
        return cls(weights, shared, places, (places[0].data_ptr(), places[1].data_ptr()))

    @property
    def form(self) -> CodePanels:
        """Any of the weights."""
        return self.weights[0]


class CodeExperts:
    """As the reference, in one call for few tokens: inputs and activations become integers of 16 bits.

    Weights that are not in panels, and experts whose width does not fill whole panels, are left to the kernel that
    calls two products for each expert, and so are many tokens.
    """

    @staticmethod
    def stack(weights: Sequence[Stored]) -> StackedCodes | Sequence[Stored]:
        """Each expert's stored weight as the kernel takes them."""
        if all(isinstance(weight, CodePanels) and _form(weight) == _form(weights[0]) for weight in weights):
            return StackedCodes.of(weights)
        return weights

    @staticmethod
    def with_shared(
        stacked: tuple[Stored, Stored], shared: tuple[Stored, Stored]
    ) -> tuple[StackedCodes, StackedCodes] | None:
        """The stacked weights with those of the shared experts; None where the kernel cannot compute these along."""
        (first, second), (gate_up, down) = stacked, shared
        if not isinstance(first, StackedCodes) or not isinstance(second, StackedCodes):
            return None
        if not isinstance(gate_up, CodePanels) or not isinstance(down, CodePanels):
            return None
        if any(weight.inputs % CHANNELS_OF_A_PANEL for weight in (second.form, down)):
            return None
        if not _alike(first.form, gate_up) or not _alike(second.form, down):
            return None
        return StackedCodes.of(first.weights, gate_up), StackedCodes.of(second.weights, down)

    def __call__(
        self,
        x: Tensor,
        ids: Tensor,
        weights: Tensor,
        gate_up: StackedCodes | Sequence[Stored],
        down: StackedCodes | Sequence[Stored],
        linear: Product,
        silu_and_mul: Callable[[Tensor], Tensor],
        elsewhere: bool = False,
    ) -> Tensor:
        """See :func:`npu_zoo.nn.kernels.reference.experts`."""
        if not isinstance(gate_up, StackedCodes) or not isinstance(down, StackedCodes):
            return cpu.experts(x, ids, weights, _apart(gate_up), _apart(down), linear, silu_and_mul, elsewhere)
        if 0 < len(x) <= FEW_TOKENS and down.form.inputs % CHANNELS_OF_A_PANEL == 0:
            return _multiply(x, ids.contiguous(), weights.contiguous(), gate_up, down)
        routed = cpu.experts(x, ids, weights, gate_up.weights, down.weights, linear, silu_and_mul, elsewhere)
        if gate_up.shared is None or down.shared is None:
            return routed
        return routed + linear.apply(silu_and_mul(linear.apply(x, gate_up.shared)), down.shared)


def _form(weight: CodePanels) -> tuple[int, int, int, int]:
    return weight.channels, weight.inputs, weight.group_size, weight.bits


def _group(weight: CodePanels) -> int:
    """Inputs that share a scale; 0 where all do."""
    return 0 if weight.group_size >= weight.inputs else weight.group_size


def _alike(weight: CodePanels, other: CodePanels) -> bool:
    return (weight.bits, _group(weight)) == (other.bits, _group(other))


def _apart(weights: StackedCodes | Sequence[Stored]) -> Sequence[Stored]:
    return weights.weights if isinstance(weights, StackedCodes) else weights


def _multiply(x: Tensor, ids: Tensor, weights: Tensor, gate_up: StackedCodes, down: StackedCodes) -> Tensor:
    hidden, form = down.form.channels, gate_up.form
    out = x.new_empty(len(x), hidden)
    rows = as_rows(x, hidden, INPUTS_OF_A_TILE)
    _experts(
        rows.data_ptr(),
        rows.stride(0),
        len(rows),
        hidden,
        down.form.inputs,
        ids.data_ptr(),
        weights.data_ptr(),
        ids.shape[1],
        *gate_up.addresses,
        *down.addresses,
        len(down.weights),
        down.shared.inputs if down.shared else 0,
        form.group_size,
        _group(down.form),
        form.bits,
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out


experts = CodeExperts()
