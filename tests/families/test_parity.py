"""Every architecture against transformers' own classes: greedy tokens, and log-probabilities within 1e-4 in float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from npu_zoo import LLM, SamplingParams
from npu_zoo.core.engine import RequestOutput

TOLERANCE = 1e-4
OUTPUT_TOKENS = 12
NO_YARN = {"rope_type": "default", "rope_theta": 10000.0}
CASES: dict[str, dict[str, Any]] = {
    "v3": {"kind": "deepseek_v3"},
    "v3-q_lora": {"kind": "deepseek_v3", "q_lora_rank": 20, "seed": 1},
    "v3-one-group": {"kind": "deepseek_v3", "n_group": 1, "topk_group": 1, "seed": 2},
    "v3-two-groups": {"kind": "deepseek_v3", "n_group": 2, "topk_group": 1, "routed_scaling_factor": 1.0, "seed": 3},
    "v3-not-normalised": {"kind": "deepseek_v3", "norm_topk_prob": False, "seed": 4},
    "v3-all-sparse": {"kind": "deepseek_v3", "first_k_dense_replace": 0, "seed": 5},
    "v3-dense": {"kind": "deepseek_v3", "first_k_dense_replace": 3, "seed": 6},
    "v3-no-yarn": {"kind": "deepseek_v3", "rope_parameters": NO_YARN, "seed": 7},
    "v2": {"kind": "deepseek_v2", "n_shared_experts": 2},
    "v2-q_lora": {"kind": "deepseek_v2", "q_lora_rank": 24, "routed_scaling_factor": 4.0, "seed": 8},
    "v2-groups": {
        "kind": "deepseek_v2",
        "n_group": 4,
        "topk_group": 3,
        "topk_method": "group_limited_greedy",
        "seed": 9,
    },
    "v2-mscales": {"kind": "deepseek_v2", "seed": 10, "mscale": 0.707, "mscale_all_dim": 0.5},
    "moe": {"kind": "deepseek_moe"},
    "moe-all-sparse": {"kind": "deepseek_moe", "first_k_dense_replace": 0, "num_shared": 1, "seed": 11},
    "moe-grouped-heads": {"kind": "deepseek_moe", "num_key_value_heads": 1, "num_experts_per_tok": 1, "seed": 12},
}


OFTEN = {"v3", "v3-two-groups", "v2-q_lora", "v2-groups", "moe", "moe-grouped-heads"}
"""Cases that have between them what tells the kinds apart; the others are for make verify."""


@pytest.fixture(
    scope="module", params=[name if name in OFTEN else pytest.param(name, marks=pytest.mark.long) for name in CASES]
)
def pair(request: pytest.FixtureRequest, make_pair: Callable[..., Any]) -> Any:
    return make_pair(**CASES[request.param])


def prompts_of(vocab_size: int) -> list[list[int]]:
    """Lengths around the block size of 16, two of them with a common beginning of three blocks."""
    generator = torch.Generator().manual_seed(5)
    lengths = [1, 5, 16, 33, 70, 90]
    drawn = [torch.randint(3, vocab_size, (n,), generator=generator).tolist() for n in lengths]
    drawn.append(drawn[5][:48] + drawn[4][:20])
    return drawn


def generate(llm: LLM, prompts: list[list[int]]) -> list[RequestOutput]:
    params = SamplingParams(temperature=0, max_tokens=OUTPUT_TOKENS, ignore_eos=True, logprobs=2)
    return llm.generate(prompts, params)


def assert_equals(reference: Any, output: RequestOutput) -> None:
    """Greedy tokens and their log-probabilities are those of a forward pass of transformers over the whole text."""
    completion = output.outputs[0]
    due = scores(reference, [*output.prompt_token_ids, *completion.token_ids])
    due = due[len(output.prompt_token_ids) - 1 : -1]
    assert completion.token_ids == due.argmax(-1).tolist()
    assert len(completion.token_ids) == OUTPUT_TOKENS
    assert completion.logprobs is not None
    for row, entries in zip(due, completion.logprobs, strict=True):
        assert set(row.topk(2).indices.tolist()) <= set(entries)
        for token_id, entry in entries.items():
            assert entry.logprob == pytest.approx(float(row[token_id]), abs=TOLERANCE)


def scores(reference: Any, token_ids: list[int]) -> Tensor:
    with torch.no_grad():
        found: Tensor = reference(torch.tensor([token_ids])).logits[0].log_softmax(-1)
    return found


def test_alone(pair: Any) -> None:
    llm = pair.launch()
    for prompt in prompts_of(320):
        assert_equals(pair.reference, generate(llm, [prompt])[0])


@pytest.mark.parametrize(
    "options",
    [{}, {"max_num_batched_tokens": 24}, {"enable_prefix_caching": False}],
    ids=["batched", "chunked", "without-prefix-cache"],
)
def test_in_a_batch(pair: Any, options: dict[str, Any]) -> None:
    for output in generate(pair.launch(**options), prompts_of(320)):
        assert_equals(pair.reference, output)


@pytest.mark.parametrize("case", [name for name in CASES if name.startswith("moe")])
def test_contiguous(case: str, make_pair: Callable[..., Any]) -> None:
    pair = make_pair(**CASES[case])
    for output in generate(pair.launch(attention="flash"), prompts_of(320)):
        assert_equals(pair.reference, output)


def test_in_too_little_memory(pair: Any) -> None:
    """Thirteen blocks hold both prompts and not both texts, so one of them is preempted and recomputed."""
    llm = pair.launch(kv_cache_memory=208 * pair.bytes_per_token)
    longest = prompts_of(320)[5]
    prompts = [longest + longest[:8], longest[::-1]]
    outputs = generate(llm, prompts)
    assert sum(output.metrics.preemptions for output in outputs) > 0
    for output in outputs:
        assert_equals(pair.reference, output)


def test_from_the_prefix_cache(pair: Any) -> None:
    llm = pair.launch()
    prompts = prompts_of(320)
    generate(llm, prompts)
    outputs = generate(llm, prompts)
    assert sum(output.metrics.cached_tokens for output in outputs) >= 16 * (2 + 4 + 5 + 4)
    for output in outputs:
        assert_equals(pair.reference, output)
