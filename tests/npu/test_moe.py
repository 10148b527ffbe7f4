from __future__ import annotations

from typing import Any

import pytest
import torch
import torch_npu

from npu_zoo.nn.kernels import ascend, reference
from npu_zoo.simulator.errors import NoSemantics

TOKENS, EXPERTS, WIDTH, INNER, K = 7, 8, 32, 16, 3


def experts_in_a_loop(
    x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    output = torch.zeros_like(x, dtype=torch.float64)
    for token in range(len(x)):
        for expert, weight in zip(indices[token].tolist(), weights[token].tolist(), strict=True):
            hidden = x[token].double() @ gate_up[expert].double()
            gate, up = hidden[:INNER], hidden[INNER:]
            output[token] += weight * ((gate * gate.sigmoid() * up) @ down[expert].double())
    return output


def weights() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        torch.randn(TOKENS, WIDTH).half(),
        (torch.randn(EXPERTS, WIDTH, 2 * INNER) / 6).half(),
        (torch.randn(EXPERTS, INNER, WIDTH) / 4).half(),
    )


@pytest.mark.chip("ascend910b")
@pytest.mark.parametrize("listed", [False, True])
def test_the_layer_equals_a_loop_over_tokens(listed: bool) -> None:
    x, gate_up, down = weights()
    device = x.npu()
    probs, indices, _ = torch_npu.npu_moe_gating_top_k_softmax(torch.randn(TOKENS, EXPERTS).half().npu(), k=K)
    rows, row_index, counts, _ = torch_npu.npu_moe_init_routing_v2(
        device, indices, active_num=TOKENS * K, expert_num=EXPERTS, expert_tokens_num_type=1,
        expert_tokens_num_flag=True, active_expert_range=[0, EXPERTS], quant_mode=-1,
    )  # fmt: skip

    def product(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return torch_npu.npu_grouped_matmul(
            x=[rows], weight=list(weight.npu()) if listed else [weight.npu()], split_item=2, group_type=0,
            group_list_type=1, group_list=counts,
        )[0]  # fmt: skip

    hidden = product(torch_npu.npu_swiglu(product(rows, gate_up)), down)
    found = torch_npu.npu_moe_token_unpermute(permuted_tokens=hidden, sorted_indices=row_index.abs(), probs=probs)
    expected = experts_in_a_loop(x, gate_up, down, indices.cpu(), probs.cpu())
    torch.testing.assert_close(found.cpu().double(), expected, atol=1e-2, rtol=1e-2)
    assert counts.cpu().tolist() == [int((indices.cpu() == e).sum()) for e in range(EXPERTS)]


@pytest.mark.chip("ascend910b")
def test_rows_of_other_ranks_stay_out() -> None:
    x = torch.randn(TOKENS, WIDTH).half()
    indices = torch.randint(0, EXPERTS, (TOKENS, K), dtype=torch.int32)
    rows, row_index, counts, _ = torch_npu.npu_moe_init_routing_v2(
        x.npu(), indices.npu(), active_num=TOKENS * K, expert_num=EXPERTS, expert_tokens_num_type=1,
        expert_tokens_num_flag=True, active_expert_range=[2, 5], quant_mode=-1,
    )  # fmt: skip
    position = 0
    for expert in (2, 3, 4):
        for token, slot in (indices == expert).nonzero().tolist():
            assert torch.equal(rows[position].cpu(), x[token])
            assert int(row_index[token * K + slot]) == position
            position += 1
    assert counts.cpu().tolist() == [int((indices == e).sum()) for e in (2, 3, 4)]
    outside = ((indices < 2) | (indices > 4)).flatten()
    assert row_index.cpu()[outside].tolist() == [-1] * int(outside.sum())


@pytest.mark.chip("ascend910b")
@pytest.mark.parametrize("kind", [0, 1, 2])
@pytest.mark.parametrize("bounds", [(0, EXPERTS), (2, 6)])
def test_how_many_tokens_each_expert_takes(kind: int, bounds: tuple[int, int]) -> None:
    first, end = bounds
    indices = torch.tensor([[0, 3, 5], [3, 5, 7], [5, 2, 0]], dtype=torch.int32)
    found = torch_npu.npu_moe_init_routing_v2(
        torch.randn(3, WIDTH).half().npu(), indices.npu(), active_num=9, expert_num=EXPERTS,
        expert_tokens_num_type=kind, expert_tokens_num_flag=True, active_expert_range=[first, end], quant_mode=-1,
    )[2].cpu().tolist()  # fmt: skip
    counts = [indices.flatten().tolist().count(expert) for expert in range(first, end)]
    pairs = [[expert, counts[expert - first]] for expert in range(first, end) if counts[expert - first]]
    expected = {
        0: [sum(counts[: i + 1]) for i in range(len(counts))],
        1: counts,
        2: pairs + [[0, 0]] * (EXPERTS - len(pairs)),
    }
    assert found == expected[kind]


@pytest.mark.chip("ascend910b")
def test_numbers_that_are_not_asked_for_are_not_there() -> None:
    x, indices = torch.randn(3, WIDTH).half(), torch.tensor([[0, 1], [2, 3], [1, 0]], dtype=torch.int32)
    numbers = torch_npu.npu_moe_init_routing_v2(
        x.npu(), indices.npu(), expert_num=4, active_expert_range=[0, 4], quant_mode=-1
    )[2]
    assert numbers.cpu().tolist() == [0] * 4


@pytest.mark.chip("ascend910b")
@pytest.mark.parametrize("active_num", [9, 4])
def test_both_kinds_of_indices(active_num: int) -> None:
    x, scale = torch.randn(3, WIDTH).half(), torch.rand(3)
    indices = torch.tensor([[4, 0, 2], [2, 4, 6], [0, 2, 5]], dtype=torch.int32)
    arguments = {
        "active_num": active_num, "expert_num": EXPERTS, "expert_tokens_num_type": 1, "expert_tokens_num_flag": True,
        "active_expert_range": [2, 6], "quant_mode": -1, "scale": scale.npu(),
    }  # fmt: skip
    gather = torch_npu.npu_moe_init_routing_v2(x.npu(), indices.npu(), row_idx_type=0, **arguments)
    scatter = torch_npu.npu_moe_init_routing_v2(x.npu(), indices.npu(), row_idx_type=1, **arguments)
    order = [2, 3, 7, 0, 4, 8]  # of the flat indices: experts 2, 2, 2, 4, 4, 5
    assert scatter[1].cpu().tolist()[:6] == order
    assert [int(gather[1][flat]) for flat in order] == list(range(6))
    assert sorted(gather[1].cpu().tolist())[:3] == [-1] * 3
    for rows, _, counts, scales in (gather, scatter):
        assert counts.cpu().tolist() == [3, 0, 2, 1]
        assert rows.shape == (active_num, WIDTH)
        for position, flat in enumerate(order[:active_num]):
            assert torch.equal(rows[position].cpu(), x[flat // 3])
            assert float(scales[position]) == float(scale[flat // 3])


@pytest.mark.chip("ascend910b")
@pytest.mark.parametrize("shared", [False, True])
def test_routing_with_eight_bits_and_smooth_scales(shared: bool) -> None:
    x = torch.randn(TOKENS, WIDTH).half()
    indices = torch.stack([torch.randperm(EXPERTS)[:K] for _ in range(TOKENS)]).int()
    smooth = torch.rand(1 if shared else 4, WIDTH) + 0.5
    codes, row_index, _, scales = torch_npu.npu_moe_init_routing_v2(
        x.npu(), indices.npu(), scale=smooth.npu(), active_num=TOKENS * K, expert_num=EXPERTS,
        expert_tokens_num_type=1, expert_tokens_num_flag=True, active_expert_range=[2, 6], quant_mode=1,
    )  # fmt: skip
    seen = 0
    for token in range(TOKENS):
        for slot, expert in enumerate(indices[token].tolist()):
            if not 2 <= expert < 6:
                continue
            position = int(row_index[token * K + slot])
            wide = x[token].double() * smooth[0 if shared else expert - 2].double()
            step = float(wide.abs().max()) / 127
            assert float(scales[position]) == pytest.approx(step, rel=1e-5)
            assert float((codes[position].cpu() - wide / step).abs().max()) <= 0.51
            seen += 1
    assert seen == int(((indices >= 2) & (indices < 6)).sum())


@pytest.mark.chip("ascend910b")
def test_where_the_rows_of_experts_end() -> None:
    experts = torch.tensor([0, 0, 2, 2, 2, 5], dtype=torch.int32)
    found = torch_npu.npu_moe_compute_expert_tokens(experts.npu(), 7)
    assert (found.dtype, found.cpu().tolist()) == (torch.int32, [2, 2, 5, 5, 5, 6, 6])


@pytest.mark.chip("ascend310p")
def test_routing_on_310p_counts_cumulatively() -> None:
    x = torch.randn(TOKENS, WIDTH).half()
    indices = torch.randint(0, EXPERTS, (TOKENS, K), dtype=torch.int32)
    rows, row_index, ends, counts = torch_npu.npu_moe_init_routing_v2(
        x.npu(), indices.npu(), active_num=TOKENS * K, expert_num=EXPERTS, expert_tokens_num_type=1,
        expert_tokens_num_flag=True, active_expert_range=[0, EXPERTS], quant_mode=-1,
    )  # fmt: skip
    expected = [int((indices == e).sum()) for e in range(EXPERTS)]
    assert counts.cpu().tolist() == expected
    assert ends.cpu().tolist() == [sum(expected[: e + 1]) for e in range(EXPERTS)]
    assert torch.equal(rows.cpu()[row_index.cpu().long()], x.repeat_interleave(K, 0))


def test_groups_that_end_where_they_end() -> None:
    rows = torch.randn(6, WIDTH).half()
    weight = torch.randn(3, WIDTH, 48).half()
    ends = torch.tensor([2, 2, 6])
    found = torch_npu.npu_grouped_matmul(
        x=[rows.npu()], weight=[weight.npu()], split_item=3, group_type=0, group_list_type=0, group_list=ends.npu()
    )[0]
    expected = torch.cat([rows[:2].double() @ weight[0].double(), rows[2:].double() @ weight[2].double()])
    torch.testing.assert_close(found.cpu().double(), expected, atol=2e-2, rtol=2e-2)


@pytest.mark.chip("ascend910b")
@pytest.mark.parametrize("split_item", [0, 1, 2, 3])
def test_products_of_pairs_of_tensors(split_item: int) -> None:
    rows = [torch.randn(size, WIDTH).half() for size in (2, 1, 4)]
    weights = [torch.randn(WIDTH, 48).half() for _ in rows]
    biases = [torch.randn(48).half() for _ in rows]
    found = torch_npu.npu_grouped_matmul(
        x=[one.npu() for one in rows], weight=[one.npu() for one in weights], bias=[one.npu() for one in biases],
        split_item=split_item, group_type=-1 if split_item < 2 else 0,
        group_list=None if split_item < 2 else torch.tensor([2, 3, 7]).npu(),
    )  # fmt: skip
    expected = [x.double() @ w.double() + b.double() for x, w, b in zip(rows, weights, biases, strict=True)]
    if split_item > 1:
        expected = [torch.cat(expected)]
    assert len(found) == len(expected)
    for one, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(one.cpu().double(), wanted, atol=2e-2, rtol=2e-2)


@pytest.mark.chip("ascend910b")
def test_groups_named_by_a_list_of_numbers() -> None:
    rows, weights = torch.randn(6, WIDTH).half(), [torch.randn(WIDTH, 48).half() for _ in range(3)]
    found = torch_npu.npu_grouped_matmul([rows.npu()], [one.npu() for one in weights], group_list=[1, 4, 6])
    expected = [part.double() @ w.double() for part, w in zip(rows.split([1, 3, 2]), weights, strict=True)]
    for one, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(one.cpu().double(), wanted, atol=2e-2, rtol=2e-2)


@pytest.mark.chip("ascend910b")
def test_groups_named_by_pairs() -> None:
    rows, weight = (
        torch.randint(-9, 9, (5, WIDTH), dtype=torch.int8),
        torch.randint(-9, 9, (3, WIDTH, 32)).to(torch.int8),
    )
    scale, tokens = (torch.rand(3, 32) / 100).bfloat16(), torch.rand(5)
    found = torch_npu.npu_grouped_matmul(
        x=[rows.npu()], weight=[weight.npu()], scale=[scale.npu()], per_token_scale=[tokens.npu()], split_item=3,
        group_type=0, group_list_type=2, group_list=torch.tensor([[0, 1], [2, 3], [0, 0]]).npu(),
        output_dtype=torch.bfloat16,
    )[0]  # fmt: skip
    for row, expert in enumerate((0, 2, 2, 2)):
        expected = (rows[row].long() @ weight[expert].long()).double() * scale[expert].double() * tokens[row].double()
        torch.testing.assert_close(found[row].cpu().double(), expected, atol=1e-3, rtol=2**-7)


@pytest.mark.chip("ascend910b")
@pytest.mark.parametrize(("bits", "groups"), [(8, 1), (4, 1), (4, 2)])
def test_experts_with_weights_of_few_bits(bits: int, groups: int) -> None:
    limit = 1 << (bits - 1)
    rows, codes = torch.randn(6, 64).half(), torch.randint(-limit, limit, (2, 64, 32), dtype=torch.int32)
    scale, offset = (torch.rand(2, groups, 32) / 20).half(), torch.randint(-3, 3, (2, groups, 32)).half()
    if bits == 8:
        weight = codes.to(torch.int8).npu()
    else:
        weight = torch_npu.npu_convert_weight_to_int4pack(codes.flatten(0, 1).npu()).view(2, 64, 4)
    given = [values if groups > 1 else values[:, 0].contiguous() for values in (scale, offset)]
    found = torch_npu.npu_grouped_matmul(
        x=[rows.npu()], weight=[weight], antiquant_scale=[given[0].npu()], antiquant_offset=[given[1].npu()],
        split_item=2, group_type=0, group_list_type=1, group_list=torch.tensor([4, 2]).npu(),
    )[0]  # fmt: skip
    for row in range(6):
        expert = 0 if row < 4 else 1
        expected = torch.zeros(32, dtype=torch.float64)
        for depth in range(64):
            group = depth * groups // 64
            restored = (codes[expert, depth] + offset[expert, group].double()) * scale[expert, group].double()
            expected += rows[row, depth].double() * restored
        torch.testing.assert_close(found[row].cpu().double(), expected, atol=5e-2, rtol=5e-3)


@pytest.mark.chip("ascend910b")
def test_an_activation_in_the_product_has_no_semantics() -> None:
    rows, weight = torch.randn(4, WIDTH).half().npu(), torch.randn(2, WIDTH, 32).half().npu()
    with pytest.raises(NoSemantics, match="act_type"):
        torch_npu.npu_grouped_matmul(
            x=[rows], weight=[weight], split_item=2, group_type=0, act_type=1, group_list=torch.tensor([1, 4]).npu()
        )


def grouped_choice(
    scores: list[float], bias: list[float], groups: int, kept_groups: int, k: int, best: int
) -> list[int]:
    """DeepSeek's choice of experts for one token, as a person would make it."""
    biased = [score + extra for score, extra in zip(scores, bias, strict=True)]
    size = len(biased) // groups
    values = [sum(sorted(biased[g * size : (g + 1) * size])[-best:]) for g in range(groups)]
    chosen = sorted(range(groups), key=lambda g: -values[g])[:kept_groups]
    candidates = [e for e in range(len(biased)) if e // size in chosen]
    return sorted(candidates, key=lambda e: -biased[e])[:k]


@pytest.mark.chip("ascend910b")
@pytest.mark.parametrize("best", [1, 2])
def test_sigmoid_gating_by_groups(best: int) -> None:
    logits, bias = torch.randn(TOKENS, 16), torch.randn(16) / 3
    found, indices, _ = torch_npu.npu_moe_gating_top_k(
        logits.npu(), k=4, k_group=2, group_count=4, group_select_mode=best - 1, renorm=0, norm_type=1,
        bias=bias.npu(), routed_scaling_factor=2.5, eps=1e-20,
    )  # fmt: skip
    for token in range(TOKENS):
        scores = [1 / (1 + 2.718281828459045**-value) for value in logits[token].tolist()]
        expected = grouped_choice(scores, bias.tolist(), 4, 2, 4, best)
        assert indices[token].cpu().tolist() == expected
        total = sum(scores[e] for e in expected)
        torch.testing.assert_close(found[token].cpu(), torch.tensor([scores[e] / total * 2.5 for e in expected]))


@pytest.mark.chip("ascend910b")
@pytest.mark.parametrize("wanted", [False, True])
def test_softmax_gating_with_a_bias_for_the_choice(wanted: bool) -> None:
    logits, bias = torch.randn(TOKENS, EXPERTS), torch.randn(EXPERTS)
    found, indices, shares = torch_npu.npu_moe_gating_top_k(
        logits.npu(), k=K, bias=bias.npu(), norm_type=0, routed_scaling_factor=1.5, out_flag=wanted
    )
    expected = logits.double().exp() / logits.double().exp().sum(-1, keepdim=True)
    for token in range(TOKENS):
        best = sorted(range(EXPERTS), key=lambda e: -float(expected[token, e] + bias[e]))[:K]
        assert indices[token].cpu().tolist() == best
        torch.testing.assert_close(found[token].cpu().double(), expected[token, best] * 1.5, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(
        shares.cpu().double(), expected if wanted else torch.zeros_like(expected), atol=1e-6, rtol=1e-5
    )


@pytest.mark.chip("ascend910b")
def test_softmax_gating_is_not_renormalised() -> None:
    logits = torch.randn(TOKENS, EXPERTS)
    found, indices, rows = torch_npu.npu_moe_gating_top_k_softmax(logits.npu(), k=K)
    shares = logits.double().exp() / logits.double().exp().sum(-1, keepdim=True)
    for token in range(TOKENS):
        best = sorted(range(EXPERTS), key=lambda e: -float(shares[token, e]))[:K]
        assert indices[token].cpu().tolist() == best
        torch.testing.assert_close(found[token].cpu().double(), shares[token, best], atol=1e-6, rtol=1e-5)
        assert rows[token].cpu().tolist() == [token + TOKENS * j for j in range(K)]


@pytest.mark.chip("ascend910b")
def test_permute_and_unpermute_are_inverse() -> None:
    x = torch.randn(TOKENS, WIDTH).bfloat16()
    indices = torch.randint(0, EXPERTS, (TOKENS, 2), dtype=torch.int64)
    rows, position = torch_npu.npu_moe_token_permute(x.npu(), indices.npu())
    assert torch.equal(rows.cpu()[position.cpu().long()].view(TOKENS, 2, WIDTH)[:, 1], x)
    assert indices.flatten()[position.argsort().cpu()].tolist() == sorted(indices.flatten().tolist())
    shares = torch.tensor([[0.25, 0.75]]).expand(TOKENS, 2).contiguous()
    back = torch_npu.npu_moe_token_unpermute(rows, position, probs=shares.bfloat16().npu())
    torch.testing.assert_close(back.cpu(), x)


@pytest.mark.chip("ascend910b")
def test_routing_with_eight_bits() -> None:
    x = torch.randn(TOKENS, WIDTH).half()
    indices = torch.stack([torch.randperm(EXPERTS)[:K] for _ in range(TOKENS)]).int()
    codes, row_index, ends, scales = torch_npu.npu_moe_init_routing_v2(
        x.npu(), indices.npu(), active_num=TOKENS * K, expert_num=EXPERTS, expert_tokens_num_type=1,
        expert_tokens_num_flag=True, active_expert_range=[0, EXPERTS], quant_mode=1,
    )  # fmt: skip
    position = row_index.cpu().view(TOKENS, K)[:, 0].long()
    restored = codes.cpu()[position].float() * scales.cpu()[position][:, None]
    assert bool(((restored - x.float()).abs() <= scales.cpu()[position][:, None] / 2 + 1e-6).all())
    assert int(ends.cpu().sum()) == TOKENS * K


@pytest.mark.chip("ascend910b")
def test_the_older_routing_and_its_inverse() -> None:
    x = torch.randn(TOKENS, WIDTH).half()
    indices = torch.stack([torch.randperm(EXPERTS)[:K] for _ in range(TOKENS)]).int()
    row = torch.arange(TOKENS * K, dtype=torch.int32).view(K, TOKENS).t().contiguous()
    rows, source_to_row, experts = torch_npu.npu_moe_init_routing(x.npu(), row.npu(), indices.npu(), TOKENS)
    assert experts.cpu().tolist() == sorted(indices.flatten().tolist())
    for token in range(TOKENS):
        for slot in range(K):
            assert torch.equal(rows[int(source_to_row[slot * TOKENS + token])].cpu(), x[token])
    shares, skip = torch.rand(TOKENS, K).half(), torch.randn(TOKENS, WIDTH).half()
    bias = torch.randn(EXPERTS, WIDTH).half()
    found = torch_npu.npu_moe_finalize_routing(
        rows, skip.npu(), None, bias.npu(), shares.npu(), source_to_row, indices.npu()
    )
    expected = skip.double()
    for slot in range(K):
        expected = expected + (x.double() + bias[indices[:, slot].long()].double()) * shares[:, slot, None].double()
    torch.testing.assert_close(found.cpu().double(), expected, atol=2e-2, rtol=1e-2)


HELD = 4
"""Of the experts, how many this rank has in the tests below; ids from there on are other ranks'."""

CHOICES = {
    "none": [[HELD, HELD, HELD]] * TOKENS,
    "all": [[token % HELD, (token + 1) % HELD, (token + 2) % HELD] for token in range(TOKENS)],
    "some": [[token % 3, HELD, HELD] if token % 2 else [HELD, 3, HELD] for token in range(TOKENS)],
    "one": [[HELD, HELD, HELD]] * (TOKENS - 1) + [[HELD, 2, HELD]],
}


def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows beyond those of the experts here hold what a device's memory may hold: not a number, and infinity."""
    sort, grouped = torch_npu.npu_moe_init_routing_v2, ascend._grouped

    def poison(rows: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        rows = rows.clone()
        rows[int(counts.sum()) :: 2] = float("nan")
        rows[int(counts.sum()) + 1 :: 2] = float("inf")
        return rows

    def init_routing(*args: Any, **kwargs: Any) -> Any:
        rows, places, counts, scales = sort(*args, **kwargs)
        return poison(rows, counts), places, counts, scales

    def product(x: torch.Tensor, weight: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        return poison(grouped(x, weight, counts), counts)

    monkeypatch.setattr(torch_npu, "npu_moe_init_routing_v2", init_routing)
    monkeypatch.setattr(ascend, "_grouped", product)


@pytest.mark.chip("ascend910b")
@pytest.mark.parametrize("poison", [False, True], ids=["zeros", "poison"])
@pytest.mark.parametrize("choice", list(CHOICES))
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_experts_of_other_ranks_add_nothing(
    choice: str, poison: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    if poison:
        poisoned(monkeypatch)
    ids, shares = torch.tensor(CHOICES[choice], dtype=torch.int32), torch.rand(TOKENS, K)
    x = torch.randn(TOKENS, WIDTH).to(dtype)
    gate_up = [(torch.randn(2 * INNER, WIDTH) / 6).to(dtype) for _ in range(HELD)]
    down = [(torch.randn(WIDTH, INNER) / 4).to(dtype) for _ in range(HELD)]
    due = reference.experts(x, ids, shares, gate_up, down, reference.Linear(), reference.silu_and_mul, elsewhere=True)
    stacked = [ascend.experts.stack([weight.npu() for weight in layer]) for layer in (gate_up, down)]
    found = ascend.experts(
        x.npu(), ids.npu(), shares.npu(), *stacked, ascend.PartsLinear(), ascend.silu_and_mul, elsewhere=True
    )
    torch.testing.assert_close(found.cpu().float(), due.float(), atol=4e-2 if dtype is torch.bfloat16 else 1e-2, rtol=0)
    if choice == "none":
        assert not found.cpu().any()


@pytest.mark.chip("ascend910b")
def test_rows_are_sorted_by_the_experts_here() -> None:
    ids = torch.tensor(CHOICES["some"], dtype=torch.int32)
    x = torch.randn(TOKENS, WIDTH).half()
    rows, places, counts = ascend.sort_by_expert(x.npu(), ids.npu(), HELD, elsewhere=True)
    assert rows.shape == (TOKENS * K, WIDTH)
    assert counts.tolist() == [int((ids == expert).sum()) for expert in range(HELD)]
    flat = places.cpu()
    assert (flat == -1).tolist() == (ids == HELD).flatten().tolist()
    for slot in (flat >= 0).nonzero().flatten().tolist():
        assert torch.equal(rows[int(flat[slot])].cpu(), x[slot // K])
