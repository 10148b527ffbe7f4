"""The mixture of experts: one layer for every family, which differ in their :class:`Routing` alone."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from npu_zoo.core.errors import WeightsError
from npu_zoo.core.model_config import ModelConfig
from npu_zoo.nn.context import BuildContext, ForwardContext
from npu_zoo.nn.expert_dispatch import AllGather, AllToAll, Dispatch
from npu_zoo.nn.kernels.table import ExpertsKernel, LinearKernel, Product, Stored
from npu_zoo.nn.layer import Layer
from npu_zoo.nn.linear import Linear
from npu_zoo.nn.mlp import MLP
from npu_zoo.nn.routing import Routing


class Router(nn.Module):
    """The experts' logits, in float32 whatever the model's dtype: a rounded score can choose another expert.

    Args:
        has_bias: whether the checkpoint has a correction bias per expert, ``e_score_correction_bias``.
        linear: what multiplies in the model's dtype.
    """

    def __init__(self, hidden_size: int, num_experts: int, has_bias: bool, linear: LinearKernel) -> None:
        super().__init__()
        self.weight = _float32(num_experts, hidden_size)
        self.e_score_correction_bias = _float32(num_experts) if has_bias else None
        self._linear = linear
        self._packed: Stored | None = None
        self._apply_in_float32: Callable[[Tensor, Stored], Tensor] | None = getattr(linear, "apply_in_float32", None)

    def finish_loading(self) -> None:
        """Let the kernel multiply where it gives its sums as they are and nothing of the weight is rounded for it."""
        if self._apply_in_float32 is not None and self._packed is None:
            rounded = self.weight.bfloat16()
            if torch.equal(rounded.float(), self.weight):
                self._packed = self._linear.pack(rounded)

    def forward(self, x: Tensor) -> Tensor:
        """[T, hidden_size] to [T, num_experts], float32."""
        if self._apply_in_float32 is not None and self._packed is not None:
            return self._apply_in_float32(x, self._packed)
        return F.linear(x.float(), self.weight)


class MoE(Layer):
    """Routed experts, of which each token takes a few, and the shared ones, which every token takes.

    Parameters have the checkpoint's names: ``gate``, ``experts.N`` and ``shared_experts``.

    Raises:
        WeightsError: the config has no experts, its activation is not silu, or its groups cannot be scored.
    """

    def __init__(self, config: ModelConfig, context: BuildContext) -> None:
        super().__init__()
        moe = config.moe
        if moe is None:
            raise WeightsError("config.json has no n_routed_experts; a layer of experts cannot be built from it")
        self.routing = Routing.from_config(moe)
        self._kernels, self._tp = context.kernels, context.tp
        held = context.ranks.place.experts(moe.n_routed_experts)
        self.gate = Router(config.hidden_size, moe.n_routed_experts, self.routing.has_bias, context.kernels.linear)

        def make_mlp(num_experts: int, context: BuildContext) -> MLP:
            width = num_experts * moe.moe_intermediate_size
            return MLP(config.hidden_size, width, config.hidden_act, context, reduce=False)

        experts = [make_mlp(1, context.of_experts()) for _ in held]
        self.experts = nn.ModuleDict({str(number): expert for number, expert in zip(held, experts, strict=True)})
        self.parts_elsewhere = tuple(f"experts.{n}" for n in range(moe.n_routed_experts) if n not in held)
        self.shared_experts = make_mlp(moe.n_shared_experts, context) if moe.n_shared_experts else None
        arguments = (context.ranks, held, moe.n_routed_experts, self._route, self._compute)
        self._all_gather: Dispatch = AllGather(*arguments)
        self._dispatch = AllToAll(*arguments) if context.expert_dispatch == "all_to_all" else self._all_gather
        # Plain lists: going through the module tree costs more than a small product.
        self._gate_up = [expert.gate_up_proj for expert in experts]
        self._down = [expert.down_proj for expert in experts]
        self._stacked: tuple[Stored, Stored] | None = None
        # Elsewhere the routed experts get other tokens than the shared ones do.
        self._same_tokens = context.ranks.dp.size == 1 and self._dispatch is self._all_gather
        self._shared_along = False

    def check_quantization(self) -> None:
        """Called once the linear layers know how they are quantized.

        Raises:
            WeightsError: only some of the experts are.
            HardwareError: the kernel does not take them.
        """
        quantized = [layer.quantization for layer in (*self._gate_up, *self._down)]
        if quantized.count(quantized[0]) < len(quantized):
            raise WeightsError(
                "config.json's quantization_config ignores some of a layer's experts; they are multiplied together "
                "here, so the checkpoint must quantize all of them or none"
            )
        for layer in (self._gate_up[0], self._down[0]):
            layer.require(self._experts_kernel)

    def finish_loading(self) -> None:
        """Stack the experts' weights where the kernel takes them so, once; the routed experts then hold none."""
        stack = getattr(self._experts_kernel, "stack", None)
        if stack is None or self._stacked is not None:
            return
        self._stacked = self._stack(stack, self._gate_up), self._stack(stack, self._down)
        with_shared = getattr(self._experts_kernel, "with_shared", None)
        if with_shared is None or self.shared_experts is None or not self._same_tokens:
            return
        shared = self.shared_experts.gate_up_proj.stored, self.shared_experts.down_proj.stored
        both = with_shared(self._stacked, shared)
        if both is not None:
            self._stacked, self._shared_along = both, True

    @functools.cached_property
    def _experts_kernel(self) -> ExpertsKernel:
        quantization = self._down[0].quantization
        if quantization is None:
            return self._kernels.experts
        assert quantization.experts is not None  # bind_quantization has one for a model with experts
        return quantization.experts

    @functools.cached_property
    def _linear_kernel(self) -> Product:
        quantization = self._down[0].quantization
        return self._kernels.linear if quantization is None else quantization.linear

    @staticmethod
    def _stack(stack: Callable[[list[Stored]], Stored], layers: list[Linear]) -> Stored:
        stacked = stack([layer.stored for layer in layers])
        for layer in layers:
            layer.release()
        return stacked

    def forward(self, x: Tensor, context: ForwardContext | None = None) -> Tensor:
        """[T, hidden_size] to [T, hidden_size]; the context is needed where the attention has replicas."""
        dispatch = self._all_gather if context is None or context.captured else self._dispatch
        routed = dispatch(x, context.replica_tokens if context else ())
        if not len(x):
            return x
        shared = None if self._shared_along else self.shared_experts
        return self._tp.all_reduce(routed if shared is None else routed + shared(x))

    def _route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._kernels.route_tokens(self.gate(x), self.gate.e_score_correction_bias, self.routing)

    def _compute(self, x: Tensor, ids: Tensor, weights: Tensor, *, elsewhere: bool) -> Tensor:
        """What this rank's experts make of [T, hidden_size]; see :class:`npu_zoo.nn.expert_dispatch.Experts`."""
        gate_up: Stored
        down: Stored
        if self._stacked is None:
            gate_up, down = [layer.stored for layer in self._gate_up], [layer.stored for layer in self._down]
        else:
            gate_up, down = self._stacked
        arguments = (x, ids, weights, gate_up, down, self._linear_kernel, self._kernels.silu_and_mul)
        # A kernel that knows nothing of other ranks serves a model that has none.
        return self._experts_kernel(*arguments, elsewhere=True) if elsewhere else self._experts_kernel(*arguments)


def _float32(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(*shape, dtype=torch.float32), requires_grad=False)
