"""Drafts on the simulated device: the same texts as without, and a step with drafts is one launch of a graph, too."""

from __future__ import annotations

import os
from typing import Any

import pytest

from npu_zoo import LLM, SamplingParams
from npu_zoo.core.config import EngineArgs
from npu_zoo.core.engine import RequestOutput
from npu_zoo.dispatch import resolve
from npu_zoo.simulator import measure
from npu_zoo.testing.launches import decode_launches, drafted_launches
from npu_zoo.testing.speculation import KnownTexts, draft_from

PRODUCT = os.environ.get("NPU_ZOO_SIMULATE", "")
DUO = PRODUCT == "atlas_300i_duo"
ON_910B = pytest.mark.skipif(DUO, reason="for Ascend 910B")
FAMILIES = ["deepseek_coder", "wizardcoder"] + ([] if DUO else ["deepseek_moe", "deepseek_v3"])
LOOKUP = {"speculative_method": "prompt_lookup", "adaptive_speculation": False}
TEXTS = [
    "def add(a, b):\n    return a + b\n\n\n" * 4,
    "import os\n\n\ndef main() -> None:\n    for name in os.listdir('.'):\n        print(name)\n",
    "class Stack:\n",
]
GREEDY = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, logprobs=1)


def engine(family: str, **options: Any) -> LLM:
    shared: dict[str, Any] = {"max_model_len": 512, "kv_cache_memory": "64MiB", "dtype": "float16"}
    return LLM(f"{family}:demo", hardware=PRODUCT, **{**shared, **options})


def tokens(outputs: list[RequestOutput]) -> list[list[int]]:
    return [completion.token_ids for output in outputs for completion in output.outputs]


def check(family: str, right: float, params: SamplingParams = GREEDY, **options: Any) -> LLM:
    """The same of an engine with drafts, some of them wrong, as of one without; returns the first."""
    due = engine(family, **options).generate(TEXTS, params)
    llm = engine(family, **options, **LOOKUP)
    texts = [output.prompt_token_ids + completion.token_ids for output in due for completion in output.outputs]
    draft_from(llm, KnownTexts(texts, right, vocab_size=300))
    found = llm.generate(TEXTS, params)
    assert tokens(found) == tokens(due)
    stats = llm.engine.stats()
    assert 0 < stats.num_accepted_tokens <= stats.num_draft_tokens
    assert (stats.num_accepted_tokens < stats.num_draft_tokens) == (right < 1)
    return llm


@pytest.mark.parametrize("family", FAMILIES)
def test_texts_are_the_same_from_graphs(family: str) -> None:
    check(family, 0.7)


@pytest.mark.parametrize(
    "options",
    [
        {"enforce_eager": True},
        {"max_num_batched_tokens": 16, "max_num_seqs": 4},
        pytest.param({"attention": "flash"}, marks=ON_910B),
        pytest.param({"kv_cache_dtype": "int8", "allow_experimental": True}, marks=ON_910B),
    ],
    ids=["eager", "chunks", "flash", "int8"],
)
def test_texts_are_the_same_in_other_ways(options: dict[str, Any]) -> None:
    check("deepseek_coder", 0.7, **options)


def test_sampled_texts_are_the_same() -> None:
    check("deepseek_coder", 0.8, SamplingParams(temperature=0.8, top_p=0.9, n=2, seed=4, max_tokens=12))


@pytest.mark.parametrize("drafts", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_with_drafts_is_launched_like_one_of_as_many_sequences(family: str, drafts: int) -> None:
    options = {"dtype": "float16", "max_model_len": 512, "kv_cache_memory": "64MiB"}
    config = resolve(EngineArgs(model=f"{family}:demo", hardware=PRODUCT, **options))
    found = drafted_launches(config, [[5]], measure, enforce_eager=False, drafts=drafts)
    assert found == decode_launches(config, [[5 + n] for n in range(1 + drafts)], measure, enforce_eager=False)
    assert (found.replays, found.copies_back, found.synchronisations) == (1, 1, 1)
    assert found.launches["aclnnArgMax"] == 1
