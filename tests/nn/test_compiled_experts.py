"""The compiled kernels of experts and heads beyond the trials that every kernel has: shapes, counts, ties, threads."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from npu_zoo.compiled.library import obstacle
from npu_zoo.core.model_config import ModelConfig, MoEConfig
from npu_zoo.nn.context import BuildContext
from npu_zoo.nn.kernels import reference
from npu_zoo.nn.kernels.compiled import linear
from npu_zoo.nn.kernels.compiled.experts import StackedPanels, experts, route_tokens
from npu_zoo.nn.kernels.compiled.heads import head_linear
from npu_zoo.nn.kernels.compiled.linear import PanelLinear
from npu_zoo.nn.kernels.table import bind_kernels
from npu_zoo.nn.linear import Linear
from npu_zoo.nn.mlp import MLP
from npu_zoo.nn.moe import MoE, Router
from npu_zoo.nn.routing import Routing
from npu_zoo.registry import get_registry
from npu_zoo.selection import select_kernels

pytestmark = [
    pytest.mark.skipif(bool(obstacle()), reason=f"the compiled kernels cannot serve: {obstacle()}"),
    pytest.mark.usefixtures("inference"),
]


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_close(found: Tensor, due: Tensor, tolerance: float = 1e-2) -> None:
    assert found.dtype == torch.bfloat16
    assert found.shape == due.shape
    assert (found.float() - due).abs().max() <= tolerance * due.abs().max()


class Experts:
    """Random experts, in float32 and stacked in panels."""

    def __init__(self, count: int, hidden: int, width: int) -> None:
        self.gate_up = [(noise(2 * width, hidden, seed=10 + n) / hidden**0.5).bfloat16() for n in range(count)]
        self.down = [(noise(hidden, width, seed=100 + n) / width**0.5).bfloat16() for n in range(count)]
        self._packed = [experts.stack([PanelLinear.pack(w) for w in part]) for part in (self.gate_up, self.down)]
        assert all(isinstance(part, StackedPanels) for part in self._packed)

    def __call__(self, x: Tensor, ids: Tensor, weights: Tensor, *, elsewhere: bool = False) -> Tensor:
        return experts(x, ids, weights, *self._packed, PanelLinear, reference.silu_and_mul, elsewhere)

    def due(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """Token by token, in float32; ids beyond the last expert add nothing."""
        total = torch.zeros(x.shape)
        for expert, (gate_up, down) in enumerate(zip(self.gate_up, self.down, strict=True)):
            share = torch.where(ids == expert, weights, 0.0).sum(1, keepdim=True)
            gate, up = F.linear(x.float(), gate_up.float()).chunk(2, -1)
            total += share * F.linear(F.silu(gate) * up, down.float())
        return total


def chosen(tokens: int, count: int, top_k: int) -> tuple[Tensor, Tensor]:
    weights, ids = noise(tokens, count, seed=tokens).softmax(-1).topk(top_k)
    return ids, weights


SHAPES = [(64, 32), (32, 16), (96, 48), (40, 112), (33, 80), (7, 16), (64, 24), (64, 1)]
"""Hidden sizes and widths that do and do not fill blocks of 32 inputs and panels of 16 channels."""


@pytest.mark.parametrize(("hidden", "width"), SHAPES)
def test_any_shape_and_number_of_tokens(hidden: int, width: int) -> None:
    model = Experts(5, hidden, width)
    for tokens in (0, 1, 2, 3, 5, 16, 17, 33, 64, 200):
        x, (ids, weights) = noise(tokens, hidden).bfloat16(), chosen(tokens, 5, 3)
        found = model(x, ids, weights)
        if tokens:
            assert_close(found, model.due(x, ids, weights))
        else:
            assert found.shape == (0, hidden)


@pytest.mark.parametrize("tokens", [1, 2, 16, 31, 33, 100, 200])
def test_one_expert_has_every_token_and_others_none(tokens: int) -> None:
    model, x = Experts(9, 64, 48), noise(tokens, 64).bfloat16()
    ids = torch.tensor([8, 2, 5]).repeat(tokens, 1)
    ids[1:, 1], ids[::2, 2] = 7, 0
    weights = noise(tokens, 3, seed=1)
    assert_close(model(x, ids, weights), model.due(x, ids, weights))


@pytest.mark.parametrize("width", [384, 400])
def test_activations_that_no_cache_keeps(width: int) -> None:
    """Lines go past the caches when both of their halves are there; the last half has none beside it."""
    model, x = Experts(3, 32, width), noise(1400, 32).bfloat16()
    ids, weights = chosen(1400, 3, 2)
    first, *others = with_threads(lambda: model(x, ids, weights))
    assert_close(first, model.due(x, ids, weights))
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("tokens", [1, 3, 40, 9000])
def test_experts_of_other_ranks_add_nothing(tokens: int) -> None:
    model, x = Experts(4, 64, 32), noise(tokens, 64).bfloat16()
    ids, weights = chosen(tokens, 6, 3)
    ids = ids.clamp(max=4)
    assert_close(model(x, ids, weights, elsewhere=True), model.due(x, ids, weights))
    nobody = torch.full_like(ids, 4)
    assert torch.equal(model(x, nobody, weights, elsewhere=True), torch.zeros_like(x))


def test_tokens_that_stand_apart() -> None:
    model, wide = Experts(4, 64, 32), noise(40, 3 * 64).bfloat16()
    ids, weights = chosen(40, 4, 2)
    part = wide[:, 64:128]
    assert_close(model(part, ids, weights), model.due(part, ids, weights))
    assert_close(model(part[:1], ids[:1], weights[:1]), model.due(part[:1], ids[:1], weights[:1]))


@pytest.mark.parametrize("tokens", [2, 40])
def test_a_token_that_is_not_a_number_leaves_others_alone(tokens: int) -> None:
    model, x = Experts(4, 40, 48), noise(tokens, 40).bfloat16()
    ids, weights = chosen(tokens, 4, 2)
    due = model(x, ids, weights)
    x[0, 3] = torch.nan
    found = model(x, ids, weights)
    assert found[0].isnan().all()
    assert torch.equal(found[1:], due[1:])


def moe_layer(shared: int, width: int, hidden: int = 40) -> MoE:
    """A layer of the kernels that a run takes, with random weights."""
    moe = MoEConfig(n_routed_experts=5, moe_intermediate_size=width, num_experts_per_tok=2, n_shared_experts=shared)
    config = ModelConfig(
        moe=moe,
        hidden_size=hidden,
        intermediate_size=40,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=hidden // 2,
        vocab_size=64,
        max_position_embeddings=64,
    )
    kernels = bind_kernels(select_kernels(get_registry().kernels, "cpu", "bfloat16"))
    layer = MoE(config, BuildContext(kernels, torch.bfloat16, 64))
    for number, parameter in enumerate(layer.parameters()):
        parameter.copy_(noise(*parameter.shape, seed=number) / parameter.shape[-1] ** 0.5)
    return layer


def finish(layer: MoE) -> MoE:
    for module in layer.modules():
        if isinstance(module, Linear):
            module.pack()
    layer.finish_loading()
    layer.gate.finish_loading()
    return layer


@pytest.mark.parametrize(
    ("shared", "width", "hidden", "counts"),
    [*((*sizes, 40, (1, 2, 16, 50)) for sizes in [(1, 32), (2, 48), (3, 16), (1, 24)]), (2, 32, 64, (8000, 8500))],
)
def test_the_shared_experts_are_computed_along(
    shared: int, width: int, hidden: int, counts: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or by themselves, where panels are not whole; with the same result, of few tokens and of many."""
    due_layer, layer = moe_layer(shared, width, hidden).float(), finish(moe_layer(shared, width, hidden))
    called: list[int] = []
    plain = MLP.forward
    monkeypatch.setattr(MLP, "__call__", lambda self, x, *more: (called.append(len(x)), plain(self, x, *more))[1])
    for tokens in counts:
        x = noise(tokens, hidden, seed=tokens).bfloat16()
        found = layer(x)
        weights, ids = reference.route_tokens(due_layer.gate(x), None, due_layer.routing)
        parts = [[e.gate_up_proj.weight, e.down_proj.weight] for e in due_layer.experts.values()]
        gate_up, down = zip(*parts, strict=True)
        arguments = ids, weights, gate_up, down, reference.Linear, reference.silu_and_mul
        due = reference.experts(x.float(), *arguments)
        assert due_layer.shared_experts is not None
        both = [due_layer.shared_experts.gate_up_proj.weight, due_layer.shared_experts.down_proj.weight]
        due += F.linear(reference.silu_and_mul(F.linear(x.float(), both[0])), both[1])
        assert_close(found, due)
    assert called == ([] if width % 16 == 0 else list(counts))


@pytest.mark.parametrize("experts_of_a_layer", [3, 16, 40, 65])
def test_a_router_gives_its_sums_unrounded(experts_of_a_layer: int) -> None:
    """By the kernel where nothing of its weight is rounded for it, in float32 where something would be."""
    for rounded in (True, False):
        gate = Router(100, experts_of_a_layer, has_bias=False, linear=PanelLinear())
        weight = noise(experts_of_a_layer, 100)
        gate.weight.copy_(weight.bfloat16().float() if rounded else weight)
        gate.finish_loading()
        assert (gate._packed is not None) == rounded
        for tokens in (1, 2, 17, 33, 300):
            x = noise(tokens, 100, seed=tokens).bfloat16()
            due = x.double() @ gate.weight.double().T
            for found in with_threads(functools.partial(gate, x)):
                assert found.dtype == torch.float32
                assert (found - due).abs().max() < 2e-5


def with_threads(call: Callable[[], Tensor]) -> list[Tensor]:
    """What a call gives on one, two and three threads."""
    before, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(call())
    finally:
        torch.set_num_threads(before)
    return found


@pytest.mark.parametrize("tokens", [1, 6, 70])
def test_the_number_of_threads_changes_nothing(tokens: int) -> None:
    model, x = Experts(6, 96, 80), noise(tokens, 96).bfloat16()
    ids, weights = chosen(tokens, 6, 3)
    first, *others = with_threads(lambda: model(x, ids, weights))
    assert all(torch.equal(first, other) for other in others)
    matrices, queries = noise(3, 32, 48).bfloat16(), noise(tokens, 3, 32).bfloat16()
    first, *others = with_threads(lambda: head_linear(queries, matrices))
    assert all(torch.equal(first, other) for other in others)
    logits = noise(tokens, 24)
    first, *others = with_threads(lambda: route_tokens(logits, None, Routing(4))[0])
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize(("heads", "inputs", "outputs"), [(3, 16, 24), (2, 33, 17), (5, 64, 144), (1, 7, 5)])
def test_products_by_head(heads: int, inputs: int, outputs: int) -> None:
    weight = (noise(heads, inputs, outputs, seed=1) / inputs**0.5).bfloat16()
    for tokens in (1, 2, 5, 16, 33, 100):
        # Heads come as parts of one projection, and so stand apart.
        x = noise(tokens, 2 * heads, inputs, seed=tokens).bfloat16()[:, heads:]
        assert_close(head_linear(x, weight), torch.einsum("thi,hio->tho", x.float(), weight.float()))


ROUTINGS = [
    Routing(3),
    Routing(4, renormalize=True, scaling_factor=1.5),
    Routing(5, method="group_limited_greedy", n_group=3, topk_group=2, scaling_factor=16.0),
    Routing(4, "sigmoid", "noaux_tc", 3, 2, True, 2.5),
    Routing(6, "sigmoid", "noaux_tc"),
]


@pytest.mark.parametrize("experts_of_a_group", [2, 5, 7, 32, 85])
@pytest.mark.parametrize("routing", ROUTINGS, ids=lambda routing: f"{routing.method}-{routing.n_group}")
def test_routing_of_any_number_of_experts(routing: Routing, experts_of_a_group: int) -> None:
    count = 3 * experts_of_a_group
    bias = noise(count, seed=5) if routing.has_bias else None
    routing = Routing(**{**vars(routing), "top_k": min(routing.top_k, routing.topk_group * experts_of_a_group)})
    for tokens in (1, 20, 65):
        logits = 4 * noise(tokens, count, seed=tokens)
        weights, ids = route_tokens(logits, bias, routing)
        due_weights, due_ids = reference.route_tokens(logits, bias, routing)
        assert torch.equal(ids, due_ids)
        assert torch.allclose(weights, due_weights, rtol=2e-6, atol=1e-7)


def test_no_tokens_go_nowhere() -> None:
    weights, ids = route_tokens(torch.zeros(0, 6), None, Routing(2))
    assert (weights.shape, ids.shape, ids.dtype) == ((0, 2), (0, 2), torch.int64)


def test_of_experts_worth_the_same_the_foremost_is_chosen() -> None:
    assert route_tokens(torch.zeros(1, 9), None, Routing(4))[1].tolist() == [[0, 1, 2, 3]]
    limited = Routing(2, method="group_limited_greedy", n_group=3, topk_group=1)
    assert route_tokens(torch.tensor([[0.0, 0.0, 1.0, 1.0, 1.0, 0.0]]), None, limited)[1].tolist() == [[2, 3]]


def test_logits_far_apart() -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0, 9_999.0], [-torch.inf, 0.0, -torch.inf, -80.0]])
    weights, ids = route_tokens(logits, None, Routing(2))
    assert ids.tolist() == [[0, 3], [1, 3]]
    assert torch.allclose(weights, logits.softmax(-1).gather(1, ids), atol=1e-7)


def test_what_is_not_a_number_still_has_experts() -> None:
    logits = torch.full((20, 6), torch.nan)
    for routing in (Routing(3), Routing(2, "sigmoid", "noaux_tc", 3, 2)):
        _, ids = route_tokens(logits, torch.zeros(6), routing)
        assert all(len(set(row)) == routing.top_k and 0 <= min(row) <= max(row) < 6 for row in ids.tolist())


@pytest.mark.parametrize(("hidden", "width"), [*SHAPES, (2080, 48), (40, 2080)])
def test_a_whole_feed_forward(hidden: int, width: int) -> None:
    model = Experts(1, hidden, width)
    gate_up, down = (PanelLinear.pack(weights[0]) for weights in (model.gate_up, model.down))
    for tokens in (0, 1, 2, 16, 17, 33, 300):
        x, everyone = noise(tokens, hidden).bfloat16(), torch.zeros(tokens, 1, dtype=torch.int64)
        found = PanelLinear.feed_forward(x, gate_up, down)
        if tokens:
            assert_close(found, model.due(x, everyone, torch.ones(tokens, 1)))
        else:
            assert found.shape == (0, hidden)
    first, *others = with_threads(lambda: PanelLinear.feed_forward(x, gate_up, down))
    assert all(torch.equal(first, other) for other in others)


def test_a_dense_layer_calls_the_whole_feed_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = finish(moe_layer(1, 48)).shared_experts
    assert layer is not None
    x, calls = noise(5, 40).bfloat16(), []
    due = layer.down_proj(reference.silu_and_mul(layer.gate_up_proj(x)))
    real = linear._feed_forward

    def called(*arguments: int) -> None:
        calls.append(arguments)
        real(*arguments)

    monkeypatch.setattr(linear, "_feed_forward", called)
    assert_close(layer(x), due.float())
    assert len(calls) == 1
