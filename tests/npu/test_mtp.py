"""Drafts by the checkpoint's own layer on the simulated device: the same texts, and what seeing a step launches."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import pytest

from npu_zoo import LLM, SamplingParams
from npu_zoo.core.engine import RequestOutput
from npu_zoo.simulator import measure

PRODUCT = os.environ.get("NPU_ZOO_SIMULATE", "")
pytestmark = pytest.mark.skipif(PRODUCT == "atlas_300i_duo", reason="latent attention is for Ascend 910B")
TEXTS = ["def add(a, b):\n    return a + b\n\n\n" * 3, "class Stack:\n", "for name in names:\n"]
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)


def engine(**options: Any) -> LLM:
    shared: dict[str, Any] = {"max_model_len": 512, "kv_cache_memory": "64MiB", "dtype": "float16"}
    return LLM("deepseek_v3:demo", hardware=PRODUCT, **{**shared, **options})


def drafting(count: int, **options: Any) -> LLM:
    drafts = {"speculative_method": "mtp", "num_speculative_tokens": count, "adaptive_speculation": False}
    return engine(**drafts, **options)


def tokens(outputs: list[RequestOutput]) -> list[list[int]]:
    return [completion.token_ids for output in outputs for completion in output.outputs]


@pytest.mark.parametrize("options", [{}, {"enforce_eager": True}, {"max_num_batched_tokens": 16}], ids=str)
def test_texts_are_the_same(options: dict[str, Any]) -> None:
    plain = engine(**options)
    for count in (1, 3):
        llm = drafting(count, **options)
        for params in (GREEDY, replace(GREEDY, temperature=0.8, seed=5)):
            assert tokens(llm.generate(TEXTS, params)) == tokens(plain.generate(TEXTS, params))
        stats = llm.engine.stats()
        assert stats.num_accepted_tokens > 0.4 * stats.num_drafts


def test_drafts_are_those_of_the_cpu() -> None:
    """Of the same steps: what the layer foretells on the device and on the CPU differs only where scores nearly tie."""
    accepted = []
    for hardware in (PRODUCT, "cpu"):
        llm = LLM(
            "deepseek_v3:demo", hardware=hardware, dtype="bfloat16", max_model_len=512, kv_cache_memory="64MiB",
            speculative_method="mtp", num_speculative_tokens=1, adaptive_speculation=False,
        )  # fmt: skip
        llm.generate(TEXTS, replace(GREEDY, max_tokens=48))
        stats = llm.engine.stats()
        accepted.append(stats.num_accepted_tokens / stats.num_draft_tokens)
    assert accepted[0] == pytest.approx(accepted[1], abs=0.1)
    assert min(accepted) > 0.6


@pytest.mark.parametrize("count", [1, 3])
def test_a_step_replays_the_model_and_each_guess_once(count: int) -> None:
    llm, reports = drafting(count), []
    for length in (24, 1, 24):  # the first one captures
        with measure() as report:
            (output,) = llm.generate(TEXTS[0], replace(GREEDY, max_tokens=length))
        reports.append(report)
    metrics = output.metrics
    steps = 23 - metrics.accepted_tokens
    assert metrics.draft_tokens > 10
    # The first guess is made where the prompt is seen, which is no step of single tokens.
    assert reports[2].replays - reports[1].replays == steps + metrics.draft_tokens - 1
    assert (
        reports[2].synchronisations - reports[1].synchronisations <= 2 * steps + 6
    )  # and some where the prompt is seen
