"""Routed experts in bfloat16: which ones a token goes to, and what they make of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from npu_zoo.nn.kernels import cpu
from npu_zoo.nn.kernels.compiled.binding import ADDRESS, COUNT, FLOAT, SIZE, Function
from npu_zoo.nn.kernels.compiled.linear import PanelLinear, Panels, as_rows
from npu_zoo.nn.kernels.table import Product, Stored
from npu_zoo.nn.routing import BEST_OF_GROUP, Routing

_CHANNELS_OF_A_PANEL = 16

_route_tokens = Function(
    "zoo_route_tokens",
    *(ADDRESS, ADDRESS, SIZE, SIZE, SIZE, COUNT, SIZE, SIZE, SIZE, COUNT, FLOAT, ADDRESS, ADDRESS, COUNT),
)
_experts = Function(
    "zoo_experts",
    *(ADDRESS, SIZE, SIZE, SIZE, SIZE, ADDRESS, ADDRESS, SIZE, ADDRESS, ADDRESS, SIZE),
    *(ADDRESS, ADDRESS, SIZE, ADDRESS, COUNT),
)


def route_tokens(logits: Tensor, bias: Tensor | None, routing: Routing) -> tuple[Tensor, Tensor]:
    """As the reference; of experts that are worth the same the foremost is chosen."""
    logits = logits.contiguous()
    tokens, experts = logits.shape
    weights = logits.new_empty(tokens, routing.top_k)
    ids = logits.new_empty(tokens, routing.top_k, dtype=torch.int64)
    _route_tokens(
        logits.data_ptr(),
        None if bias is None else bias.data_ptr(),
        tokens,
        experts,
        routing.top_k,
        routing.scoring == "sigmoid",
        routing.n_group,
        routing.topk_group if routing.limits_groups else routing.n_group,
        BEST_OF_GROUP if routing.has_bias else 1,
        routing.renormalize,
        routing.scaling_factor,
        weights.data_ptr(),
        ids.data_ptr(),
        torch.get_num_threads(),
    )
    return weights, ids


@dataclass(frozen=True)
class StackedPanels:
    """Experts' weights in panels, of one shape all.

    Attributes:
        weights: of each expert.
        addresses: int64 [experts], where the panels of each lie.
        address: of those.
        shared: the weight of the shared experts, which are computed along; None where they are not.
    """

    weights: Sequence[Panels]
    addresses: Tensor
    address: int
    shared: Panels | None = None


class PanelExperts:
    """As the reference, in one call: tokens sorted by expert, both products, and the sum by the experts' weights.

    Weights that are not in panels, and experts whose width does not fill whole panels, are left to the kernel that
    calls two products for each expert.
    """

    @staticmethod
    def stack(weights: Sequence[Stored]) -> StackedPanels | Sequence[Stored]:
        """Each expert's stored weight as the kernel takes them."""
        if all(isinstance(weight, Tensor) and weight.dtype == torch.bfloat16 for weight in weights):
            weights = [PanelLinear.pack(weight) for weight in weights]
        if not all(isinstance(weight, Panels) for weight in weights):
            return weights
        addresses = torch.tensor([weight.address for weight in weights])
        return StackedPanels(weights, addresses, addresses.data_ptr())

    @staticmethod
    def with_shared(
        stacked: tuple[Stored, Stored], shared: tuple[Stored, Stored]
    ) -> tuple[StackedPanels, StackedPanels] | None:
        """The stacked weights with those of the shared experts; None where the kernel cannot compute these along."""
        (first, second), (gate_up, down) = stacked, shared
        if not isinstance(first, StackedPanels) or not isinstance(second, StackedPanels):
            return None
        if not isinstance(gate_up, Panels) or not isinstance(down, Panels):
            return None
        if any(weight.inputs % _CHANNELS_OF_A_PANEL for weight in (second.weights[0], down)):
            return None
        return replace(first, shared=gate_up), replace(second, shared=down)

    def __call__(
        self,
        x: Tensor,
        ids: Tensor,
        weights: Tensor,
        gate_up: StackedPanels | Sequence[Stored],
        down: StackedPanels | Sequence[Stored],
        linear: Product,
        silu_and_mul: Callable[[Tensor], Tensor],
        elsewhere: bool = False,
    ) -> Tensor:
        """See :func:`npu_zoo.nn.kernels.reference.experts`."""
        first, second = _stacked(gate_up), _stacked(down)
        if not isinstance(first, StackedPanels) or not isinstance(second, StackedPanels):
            return cpu.experts(x, ids, weights, _apart(first), _apart(second), linear, silu_and_mul, elsewhere)
        if second.weights[0].inputs % _CHANNELS_OF_A_PANEL:
            return cpu.experts(x, ids, weights, first.weights, second.weights, PanelLinear, silu_and_mul, elsewhere)
        return _multiply(x, ids.contiguous(), weights.contiguous(), first, second)


def _stacked(weights: StackedPanels | Sequence[Stored]) -> StackedPanels | Sequence[Stored]:
    return weights if isinstance(weights, StackedPanels) else PanelExperts.stack(weights)


def _apart(weights: StackedPanels | Sequence[Stored]) -> Sequence[Stored]:
    return weights.weights if isinstance(weights, StackedPanels) else weights


def _multiply(x: Tensor, ids: Tensor, weights: Tensor, gate_up: StackedPanels, down: StackedPanels) -> Tensor:
    hidden, width = down.weights[0].channels, down.weights[0].inputs
    out = x.new_empty(len(x), hidden)
    rows = as_rows(x, hidden)
    _experts(
        rows.data_ptr(),
        rows.stride(0),
        len(rows),
        hidden,
        width,
        ids.data_ptr(),
        weights.data_ptr(),
        ids.shape[1],
        gate_up.address,
        down.address,
        len(down.weights),
        gate_up.shared.address if gate_up.shared else None,
        down.shared.address if down.shared else None,
        down.shared.inputs if down.shared else 0,
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out


experts = PanelExperts()
