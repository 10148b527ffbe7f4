"""The compiled kernel of quantized experts: shapes, groups, counts, shared experts, and what it leaves to another."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from npu_zoo.compiled.library import obstacle
from npu_zoo.nn.kernels import cpu, reference
from npu_zoo.nn.kernels.compiled import code_experts
from npu_zoo.nn.kernels.compiled.code_experts import FEW_TOKENS, StackedCodes, experts
from npu_zoo.nn.kernels.compiled.quantized import CodePanels, PanelInt4Linear, PanelInt8Linear
from npu_zoo.nn.kernels.quantized import QuantizedWeight

pytestmark = [
    pytest.mark.skipif(bool(obstacle()), reason=f"the compiled kernels cannot serve: {obstacle()}"),
    pytest.mark.usefixtures("inference"),
]

LINEAR = {8: PanelInt8Linear, 4: PanelInt4Linear}
TOKENS = (1, 2, 3, 5, 8, 16, 17, FEW_TOKENS, FEW_TOKENS + 1)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def quantized(channels: int, inputs: int, group: int | None, bits: int, seed: int) -> QuantizedWeight:
    generator, half = torch.Generator().manual_seed(seed), 1 << (bits - 1)
    codes = torch.randint(-half, half, (channels, inputs), dtype=torch.int8, generator=generator)
    scale = (torch.rand(channels, inputs // (group or inputs), generator=generator) + 0.5) / half / inputs**0.5
    return QuantizedWeight(codes, scale, bits, torch.bfloat16)


def plain(weight: QuantizedWeight) -> Tensor:
    return weight.codes.float() * weight.scale.repeat_interleave(weight.group_size, 1)


class Model:
    """Random experts of some bits, and the shared ones where they have a width."""

    def __init__(self, bits: int, hidden: int, width: int, group: int | None = None, shared: int = 0) -> None:
        def pair(width: int, seed: int) -> tuple[QuantizedWeight, QuantizedWeight]:
            up = quantized(2 * width, hidden, group, bits, seed)
            return up, quantized(hidden, width, group, bits, seed + 50)

        self.linear = LINEAR[bits]
        self.weights = [pair(width, seed) for seed in range(5)]
        self.shared = pair(shared, 99) if shared else None
        packed = [[self.linear.pack(weight) for weight in part] for part in zip(*self.weights, strict=True)]
        self.stacked = experts.stack(packed[0]), experts.stack(packed[1])
        if self.shared is not None:
            both = experts.with_shared(self.stacked, tuple(self.linear.pack(weight) for weight in self.shared))
            assert both is not None
            self.stacked = both

    def __call__(self, x: Tensor, ids: Tensor, weights: Tensor, *, elsewhere: bool = False) -> Tensor:
        return experts(x, ids, weights, *self.stacked, self.linear, reference.silu_and_mul, elsewhere)

    def due(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        total = torch.zeros(x.shape)
        for number, pair in enumerate(self.weights):
            share = torch.where(ids == number, weights, 0.0).sum(1, keepdim=True)
            total += share * feed_forward(x, pair)
        return total if self.shared is None else total + feed_forward(x, self.shared)


def feed_forward(x: Tensor, pair: tuple[QuantizedWeight, QuantizedWeight]) -> Tensor:
    gate, up = F.linear(x.float(), plain(pair[0])).chunk(2, -1)
    return F.linear(F.silu(gate) * up, plain(pair[1]))


def chosen(tokens: int, count: int = 5, top_k: int = 3) -> tuple[Tensor, Tensor]:
    weights, ids = noise(tokens, count, seed=tokens).softmax(-1).topk(top_k)
    return ids, weights


def assert_close(found: Tensor, due: Tensor) -> None:
    assert found.dtype == torch.bfloat16
    assert (found.float() - due).abs().max() <= 1e-2 * due.abs().max()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(
    ("hidden", "width", "group"),
    [(64, 64, 64), (128, 192, 64), (256, 128, 128), (96, 160, 32), (40, 48, None), (100, 16, None)],
)
def test_any_shape_and_number_of_tokens(bits: int, hidden: int, width: int, group: int | None) -> None:
    model = Model(bits, hidden, width, group)
    assert all(isinstance(part, StackedCodes) for part in model.stacked)
    for tokens in TOKENS:
        x, choice = noise(tokens, hidden, seed=tokens).bfloat16(), chosen(tokens)
        assert_close(model(x, *choice), model.due(x, *choice))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("shared", "group"), [(48, None), (16, None), (96, None), (128, 64), (96, 32)])
def test_the_shared_experts_are_computed_along(bits: int, shared: int, group: int | None) -> None:
    model = Model(bits, 128, 192 if group else 48, group, shared)
    for tokens in TOKENS:
        x, choice = noise(tokens, 128, seed=tokens).bfloat16(), chosen(tokens)
        assert_close(model(x, *choice), model.due(x, *choice))


@pytest.mark.parametrize("bits", [8, 4])
def test_experts_of_other_ranks_add_nothing(bits: int) -> None:
    model = Model(bits, 64, 32)
    for tokens in (1, 6, FEW_TOKENS + 1):
        x, (ids, weights) = noise(tokens, 64).bfloat16(), chosen(tokens, 8)
        ids = ids.clamp(max=5)
        assert_close(model(x, ids, weights, elsewhere=True), model.due(x, ids, weights))
        nobody = torch.full_like(ids, 5)
        assert torch.equal(model(x, nobody, weights, elsewhere=True), torch.zeros_like(x))


@pytest.mark.parametrize("bits", [8, 4])
def test_a_token_that_is_not_a_number_leaves_others_alone(bits: int) -> None:
    model, x = Model(bits, 64, 48), noise(7, 64).bfloat16()
    choice = chosen(7)
    due = model(x, *choice)
    x[0, 3] = torch.nan
    found = model(x, *choice)
    assert found[0].isnan().all()
    assert torch.equal(found[1:], due[1:])


def test_the_number_of_threads_changes_nothing() -> None:
    before, found = torch.get_num_threads(), []
    model, x = Model(4, 128, 80, shared=48), noise(9, 128).bfloat16()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(model(x, *chosen(9)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_few_tokens_are_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model(8, 64, 32, shared=32)
    monkeypatch.setattr(cpu, "experts", lambda *_: pytest.fail("a product after the other"))
    for tokens in (1, FEW_TOKENS):
        model(noise(tokens, 64).bfloat16(), *chosen(tokens))


def test_what_is_not_in_panels_of_one_form_is_left_to_another() -> None:
    odd = [LINEAR[8].pack(quantized(32, inputs, None, 8, 1)) for inputs in (64, 128)]
    assert experts.stack(odd) is odd
    groups = [LINEAR[4].pack(quantized(32, 96, 48, 4, 1))] * 2
    assert not isinstance(groups[0], CodePanels)
    assert experts.stack(groups) is groups
    routed = Model(8, 128, 64)
    other = tuple(LINEAR[4].pack(weight) for weight in Model(4, 128, 64).weights[0])
    assert experts.with_shared(routed.stacked, other) is None, "codes of other bits"
    grouped = tuple(LINEAR[8].pack(weight) for weight in Model(8, 128, 64, 64).weights[0])
    assert experts.with_shared(routed.stacked, grouped) is None, "groups of another size"


def test_a_width_that_fills_no_panels_is_left_to_another(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Model(8, 64, 24), noise(3, 64).bfloat16()
    monkeypatch.setattr(code_experts, "_experts", lambda *_: pytest.fail("the panels are not whole"))
    assert_close(model(x, *chosen(3)), model.due(x, *chosen(3)))
