from __future__ import annotations

import pytest
import torch
import torch_npu

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
