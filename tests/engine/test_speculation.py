"""Speculative decoding gives what plain decoding gives: tokens, texts, probabilities and why an output ended."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from npu_zoo import LLM, SamplingParams
from npu_zoo.core.engine import CompletionOutput, RequestOutput
from npu_zoo.core.sampling import StructuredOutputs
from npu_zoo.engine.sampler import Sampler
from npu_zoo.engine.scheduler import ScheduledRow
from npu_zoo.engine.sequence import Sequence
from npu_zoo.engine.speculation.control import SpeculationControl
from npu_zoo.engine.speculation.verification import count_kept, positions
from npu_zoo.testing.speculation import KnownTexts, draft_from

Launch = Callable[..., LLM]

FAMILIES = ["deepseek_coder", "wizardcoder", "deepseek_moe", "deepseek_v3"]
LOOKUP = {"speculative_method": "prompt_lookup", "adaptive_speculation": False}
TEXTS = [
    "def add(a, b):\n    return a + b\n\n\n" * 4,
    "def add(a, b):\n    return a + b\n\n\ndef add(a, b):\n",
    "for name in names:\n    print(name)\nfor name in",
]
GREEDY = SamplingParams(temperature=0, max_tokens=48, ignore_eos=True, logprobs=2)


def fields(output: RequestOutput) -> list[Any]:
    return [(c.token_ids, c.text, c.finish_reason, c.stop_reason) for c in output.outputs]


def same(found: list[RequestOutput], due: list[RequestOutput]) -> None:
    assert [fields(output) for output in found] == [fields(output) for output in due]
    for output, expected in zip(found, due, strict=True):
        for own, other in zip(output.outputs, expected.outputs, strict=True):
            assert (own.logprobs is None) == (other.logprobs is None)
            for entry, wanted in zip(own.logprobs or (), other.logprobs or (), strict=True):
                assert entry.keys() == wanted.keys()
                assert [e.logprob for e in entry.values()] == pytest.approx(
                    [e.logprob for e in wanted.values()], abs=1e-4
                )


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_writes_the_same(family: str) -> None:
    options: dict[str, Any] = {"hardware": "cpu", "dtype": "float32", "max_model_len": 256, "kv_cache_memory": "64MiB"}
    sampled = replace(GREEDY, temperature=0.8, top_p=0.9, seed=3, n=2, repetition_penalty=1.1)
    with LLM(f"{family}:demo", **options) as plain, LLM(f"{family}:demo", **options, **LOOKUP) as drafting:
        for params in (GREEDY, sampled):
            found = drafting.generate(TEXTS, params)
            same(found, plain.generate(TEXTS, params))
            assert sum(output.metrics.accepted_tokens for output in found) > 10
        stats = drafting.engine.stats()
        assert stats.num_draft_tokens >= stats.num_accepted_tokens > 20
        assert stats.num_draft_tokens <= 3 * stats.num_drafts


@pytest.fixture(scope="module")
def plain(launch: Launch, checkpoint: Path) -> LLM:
    return launch(checkpoint)


@pytest.fixture(scope="module")
def drafting(launch: Launch, checkpoint: Path) -> LLM:
    return launch(checkpoint, **LOOKUP, num_speculative_tokens=4)


PROMPTS = [list(range(20, 70)), list(range(20, 53)), [7, 8, 9], list(range(100, 141))]
WAYS = {
    "greedy": SamplingParams(temperature=0, max_tokens=30, ignore_eos=True),
    "sampled": SamplingParams(temperature=1, top_p=0.95, top_k=50, min_p=0.01, seed=1, max_tokens=30, n=3),
    "penalties": SamplingParams(
        temperature=0.7, repetition_penalty=1.4, presence_penalty=0.6, frequency_penalty=0.4, seed=2, max_tokens=30
    ),
    "logprobs": SamplingParams(temperature=0, logprobs=3, prompt_logprobs=1, max_tokens=30),
    "biases": SamplingParams(temperature=0, logit_bias={5: 4.0, 9: -50.0}, max_tokens=30, ignore_eos=True),
    "no token more": SamplingParams(temperature=0, max_tokens=1),
}


@pytest.mark.parametrize("right", [1.0, 0.7, 0.0])
@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_sampling(plain: LLM, drafting: LLM, way: str, right: float) -> None:
    due = plain.generate(PROMPTS, WAYS[way])
    check_against(due, drafting, WAYS[way], right)


def check_against(
    due: list[RequestOutput], llm: LLM, params: SamplingParams, right: float = 0.8
) -> list[RequestOutput]:
    """The same of an engine that is given drafts of what is due."""
    texts = [output.prompt_token_ids + own.token_ids for output in due for own in output.outputs]
    draft_from(llm, KnownTexts(texts, right, vocab_size=300))
    found = llm.generate([output.prompt_token_ids for output in due], params)
    same(found, due)
    drafted, accepted = (sum(getattr(o.metrics, name) for o in found) for name in ("draft_tokens", "accepted_tokens"))
    assert (accepted > 0) == (right > 0 and params.max_tokens != 1)
    assert (drafted > 0) == (params.max_tokens != 1)
    assert right < 1 or accepted <= drafted <= accepted + 4 * len(texts)
    return found


def test_an_output_ends_where_it_would_inside_of_right_drafts(plain: LLM, drafting: LLM) -> None:
    whole = plain.generate([PROMPTS[0]], WAYS["greedy"])[0].outputs[0]
    places = Counter(whole.token_ids)
    once = next(token for token in whole.token_ids[9:] if places[token] == 1)
    ended = []
    for params in (
        replace(WAYS["greedy"], stop_token_ids=(once,)),
        replace(WAYS["greedy"], stop=(whole.text[20:24],)),
        replace(WAYS["greedy"], stop=(whole.text[20:24],), min_tokens=25),
        *(replace(WAYS["greedy"], max_tokens=count) for count in range(2, 9)),
    ):
        due = plain.generate([PROMPTS[0]], params)
        draft_from(drafting, KnownTexts([PROMPTS[0] + whole.token_ids]))
        found = drafting.generate([PROMPTS[0]], params)
        same(found, due)
        ended.append(found[0].outputs[0].finish_reason)
    assert ended[:2] == ["stop", "stop"]
    assert drafting.engine.kv.num_free == drafting.engine.kv.num_total  # type: ignore[attr-defined]


def test_what_has_to_keep_a_form_gets_no_drafts(plain: LLM, drafting: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=40, structured_outputs=StructuredOutputs(regex="[a-f]{30}"))
    due = plain.generate([PROMPTS[0]], params)
    draft_from(drafting, KnownTexts([PROMPTS[0] + due[0].outputs[0].token_ids]))
    found = drafting.generate([PROMPTS[0]], params)
    same(found, due)
    assert found[0].metrics.draft_tokens == 0


@pytest.mark.parametrize(
    "options",
    [
        {"block_size": 4},
        {"block_size": 2, "max_num_batched_tokens": 7},
        {"attention": "flash"},
        {"kv_cache_dtype": "int8", "block_size": 64, "allow_experimental": True},
        {"block_size": 4, "kv_cache_memory": 124 * 512, "max_model_len": 120},
    ],
    ids=["small blocks", "chunks", "flash", "int8", "preemption"],
)
def test_every_kind_of_cache(launch: Launch, checkpoint: Path, options: dict[str, Any]) -> None:
    stored = options if "kv_cache_dtype" in options else {}
    due = launch(checkpoint, **stored).generate(PROMPTS, WAYS["greedy"])
    llm = launch(checkpoint, **LOOKUP, **options)
    for _ in range(2):  # the second time from the prefix cache, with what drafts have filled
        found = check_against(due, llm, WAYS["greedy"])
    if "kv_cache_memory" in options:
        assert sum(output.metrics.preemptions for output in found) > 0


def test_blocks_that_drafts_have_filled_are_found_by_the_next_turn(launch: Launch, checkpoint: Path) -> None:
    llm = launch(checkpoint, **LOOKUP, block_size=4)
    whole = launch(checkpoint).generate([PROMPTS[0]], WAYS["greedy"])
    (first,) = check_against(whole, llm, WAYS["greedy"], right=1.0)
    conversation = [*PROMPTS[0], *first.outputs[0].token_ids, 5, 6]
    (again,) = llm.generate([conversation], WAYS["greedy"])
    (fresh,) = launch(checkpoint).generate([conversation], WAYS["greedy"])
    assert again.metrics.cached_tokens >= (len(conversation) - 2) // 4 * 4 - 4
    assert fields(again) == fields(fresh)


def test_drafting_that_does_not_pay_stops_by_itself(launch: Launch, checkpoint: Path) -> None:
    llm = launch(checkpoint, **LOOKUP)
    control = SpeculationControl()
    draft_from(llm, KnownTexts([], 0.0), control=control)

    class Useless(KnownTexts):
        def _draft(self, token_ids: list[int], limit: int) -> list[int]:
            return [299] * limit

    now = iter(range(1_000_000))
    draft_from(llm, Useless([]), control=control)
    # Every look at the clock is a second later, so that no step is faster than another and none gains by drafts.
    llm.engine.speculator._clock = lambda: float(next(now))  # type: ignore[attr-defined]
    llm.generate([PROMPTS[0]], SamplingParams(temperature=0, max_tokens=100, ignore_eos=True))
    stats = llm.engine.stats()
    assert stats.num_accepted_tokens == 0
    assert 0 < stats.num_drafts <= 100


def chi_square(counts: list[int], probabilities: list[float]) -> float:
    total = sum(counts)
    return sum((n - total * p) ** 2 / (total * p) for n, p in zip(counts, probabilities, strict=True))


AT_99_9_PERCENT = {6: 22.46, 7: 24.32}
"""Chi-square's critical values, by degrees of freedom."""


def test_accepted_and_rejected_drafts_leave_the_distribution_as_it_is() -> None:
    """Against softmax itself: tokens at a position, and those behind an accepted draft."""
    rounds, draft = 20_000, 3
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(2, 8, generator=generator)
    first, second = torch.softmax(logits, -1).tolist()
    rows = [
        ScheduledRow(Sequence(0, [1, 2], 1, SamplingParams(), 9, seed, CompletionOutput(0)), 1, 2, (draft,))
        for seed in range(rounds)
    ]
    drawn_for = [position for row in rows for position in positions(row)]
    drawn = Sampler().sample(logits.repeat(rounds, 1), drawn_for, [()] * len(drawn_for)).token_ids
    kept = [drawn[2 * n : 2 * n + count_kept((draft,), drawn[2 * n : 2 * n + 2])] for n in range(rounds)]
    at_first, at_second = Counter(tokens[0] for tokens in kept), Counter(t[1] for t in kept if len(t) == 2)
    assert sum(at_second.values()) == at_first[draft]
    assert chi_square([at_first[token] for token in range(8)], first) < AT_99_9_PERCENT[7]
    assert chi_square([at_second[token] for token in range(8)], second) < AT_99_9_PERCENT[7]
    rejected = [token for token in range(8) if token != draft]
    residual = [first[token] / (1 - first[draft]) for token in rejected]
    assert chi_square([at_first[token] for token in rejected], residual) < AT_99_9_PERCENT[6]
