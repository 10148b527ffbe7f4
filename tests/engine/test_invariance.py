"""What a request gets depends on it alone: not on the batch, chunks, cached prefixes, preemption or backend."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from npu_zoo import LLM, SamplingParams
from npu_zoo.core.engine import RequestOutput
from npu_zoo.testing.speculation import KnownTexts, draft_from

Launch = Callable[..., LLM]
Tokens = list[list[int]]

MAX_MODEL_LEN = 96
BYTES_PER_TOKEN = 2 * 2 * 2 * 16 * 4  # layers, keys and values, heads, head size, float32
GREEDY = SamplingParams(temperature=0, max_tokens=20)
SAMPLED = SamplingParams(temperature=1, top_p=0.9, top_k=40, max_tokens=20, ignore_eos=True)


def _prompts() -> Tokens:
    """Prompts that begin alike by halves, by whole blocks and to the last token, and some that share nothing."""
    draw = random.Random(3)
    stem = [draw.randrange(3, 320) for _ in range(64)]
    own = [[draw.randrange(3, 320) for _ in range(length)] for length in (1, 5, 40)]
    return [stem[:32], stem[:33], stem, stem[:48] + own[0], stem[:20] + own[2], *own]


PROMPTS = _prompts()
PARAMS = [
    *[(index, GREEDY) for index in range(len(PROMPTS))],
    *[(index, replace(SAMPLED, seed=index)) for index in range(len(PROMPTS))],
    (2, replace(SAMPLED, seed=2, min_p=0.05, top_p=1.0, top_k=0)),
    (3, replace(SAMPLED, seed=3, repetition_penalty=1.3, frequency_penalty=0.5)),
    (4, replace(SAMPLED, seed=4, n=3)),
]
"""The requests: which prompt, and how."""


@st.composite
def engine_options(draw: st.DrawFn) -> dict[str, Any]:
    flash = draw(st.booleans())
    chunked = draw(st.booleans())
    fewest_tokens = 1 if chunked else MAX_MODEL_LEN
    options: dict[str, Any] = {
        "attention": "flash" if flash else "paged",
        "max_num_seqs": draw(st.integers(1, 24)),
        "max_num_batched_tokens": draw(st.integers(fewest_tokens, fewest_tokens + 150)),
        "enable_chunked_prefill": chunked,
    }
    if not flash:
        options["block_size"] = draw(st.sampled_from((1, 2, 4, 8, 16, 32)))
        options["enable_prefix_caching"] = draw(st.booleans())
    if draw(st.booleans()):
        options |= {"speculative_method": "prompt_lookup", "num_speculative_tokens": draw(st.integers(1, 6))}
    tokens = draw(st.integers(MAX_MODEL_LEN, 3 * MAX_MODEL_LEN) | st.just(4096))
    return {**options, "kv_cache_memory": -(-tokens // 32) * 32 * BYTES_PER_TOKEN}


@pytest.fixture(scope="module")
def start(launch: Launch, checkpoint: Path) -> Launch:
    def start(**options: Any) -> LLM:
        return launch(checkpoint, **{"max_model_len": MAX_MODEL_LEN, **options})

    return start


@pytest.fixture(scope="module")
def alone(start: Launch) -> list[Tokens]:
    """The completions of every request of PARAMS, run one at a time with nothing shared."""
    llm = start(enable_prefix_caching=False)
    return [completions(llm.generate([PROMPTS[index]], params)) for index, params in PARAMS]


def guess(llm: LLM, alone: list[Tokens], right: float) -> LLM:
    """Where an engine drafts, have it draft what is due, some of it wrong: these texts repeat nothing to look up."""
    if llm.engine.config.speculation is not None:
        texts = [PROMPTS[index] + own for (index, _), due in zip(PARAMS, alone, strict=True) for own in due]
        draft_from(llm, KnownTexts(texts, right, vocab_size=320))
    return llm


def completions(outputs: list[RequestOutput]) -> Tokens:
    return [completion.token_ids for output in outputs for completion in output.outputs]


def is_clean(llm: LLM) -> bool:
    kv = llm.engine.kv  # type: ignore[attr-defined]
    if hasattr(kv, "check"):
        kv.check(())
    return bool(kv.num_free == kv.num_total) and not llm.engine.has_unfinished_requests()


@settings(max_examples=settings().max_examples // 10)  # engines are started for each
@given(
    options=engine_options(),
    chosen=st.lists(st.integers(0, len(PARAMS) - 1), min_size=1, max_size=14),
    right=st.sampled_from((1.0, 0.7, 0.0)),
)
def test_in_any_batch_on_any_engine(
    start: Launch, alone: list[Tokens], options: dict[str, Any], chosen: list[int], right: float
) -> None:
    llm = guess(start(**options), alone, right)
    requests = [PARAMS[i] for i in chosen]
    outputs = llm.generate([PROMPTS[index] for index, _ in requests], [params for _, params in requests])
    for i, output in zip(chosen, outputs, strict=True):
        assert completions([output]) == alone[i]
    assert is_clean(llm)


@settings(max_examples=settings().max_examples // 10)
@given(options=engine_options(), data=st.data())
def test_requests_that_come_and_go(
    start: Launch, alone: list[Tokens], options: dict[str, Any], data: st.DataObject
) -> None:
    llm, finished = guess(start(**options), alone, 0.8), {}
    chosen = data.draw(st.lists(st.integers(0, len(PARAMS) - 1), min_size=1, max_size=10))
    aborted = data.draw(st.sets(st.integers(0, len(chosen) - 1), max_size=3))
    for number, i in enumerate(chosen):
        index, params = PARAMS[i]
        llm.engine.add_request(str(number), PROMPTS[index], params)
        for _ in range(data.draw(st.integers(0, 12))):
            finished.update({o.request_id: o for o in llm.engine.step() if o.finished})
        if number in aborted:
            llm.engine.abort_request(str(number))
    while llm.engine.has_unfinished_requests():
        finished.update({o.request_id: o for o in llm.engine.step() if o.finished})
    for number, i in enumerate(chosen):
        assert number in aborted or completions([finished[str(number)]]) == alone[i]
    assert is_clean(llm)


@pytest.mark.parametrize("block_size", [1, 4, 16, 32])
def test_a_repeated_prompt_comes_from_the_cache(start: Launch, alone: list[Tokens], block_size: int) -> None:
    llm = start(block_size=block_size)
    for repetition in range(3):
        output = llm.generate([PROMPTS[2]], GREEDY)[0]
        assert completions([output]) == alone[2]
        reusable = (len(PROMPTS[2]) - 1) // block_size * block_size
        assert output.metrics.cached_tokens == (reusable if repetition else 0)


def test_equal_prompts_of_one_step_share_blocks(start: Launch, alone: list[Tokens]) -> None:
    llm = start(block_size=16)
    outputs = llm.generate([PROMPTS[2], PROMPTS[2], PROMPTS[3]], GREEDY)
    assert [completions([o]) for o in outputs] == [alone[2], alone[2], alone[3]]
    assert [o.metrics.cached_tokens for o in outputs] == [0, 48, 48]


def test_generated_tokens_are_shared_too(start: Launch) -> None:
    llm, params = start(block_size=4), replace(GREEDY, ignore_eos=True)
    first = llm.generate([PROMPTS[6]], params)[0]
    conversation = [*first.prompt_token_ids, *first.outputs[0].token_ids, 5, 6, 7]
    again = llm.generate([conversation], params)[0]
    fresh = start(enable_prefix_caching=False).generate([conversation], params)[0]
    assert again.metrics.cached_tokens >= 20
    assert completions([again]) == completions([fresh])


@pytest.mark.parametrize("chunk", [7, 512])
def test_preemption_is_not_seen(start: Launch, alone: list[Tokens], chunk: int) -> None:
    memory = 128 * BYTES_PER_TOKEN
    llm = start(block_size=4, kv_cache_memory=memory, max_num_batched_tokens=chunk, enable_prefix_caching=False)
    outputs = llm.generate([PROMPTS[index] for index, _ in PARAMS], [params for _, params in PARAMS])
    assert [completions([output]) for output in outputs] == alone
    assert sum(output.metrics.preemptions for output in outputs) > 0
    assert is_clean(llm)


def test_probabilities_survive_chunks_and_preemption(start: Launch) -> None:
    params = replace(GREEDY, logprobs=2, prompt_logprobs=2, ignore_eos=True)
    whole = start(enable_prefix_caching=False).generate(PROMPTS, params)
    tight = start(block_size=2, kv_cache_memory=128 * BYTES_PER_TOKEN, max_num_batched_tokens=9)
    outputs = tight.generate(PROMPTS, params)
    assert sum(output.metrics.preemptions for output in outputs) > 0
    for output, due in zip(outputs, whole, strict=True):
        assert flat(output) == pytest.approx(flat(due), abs=1e-4)


def flat(output: RequestOutput) -> dict[tuple[int, int], float]:
    """All log-probabilities by position and token."""
    assert output.prompt_logprobs is not None
    assert output.outputs[0].logprobs is not None
    positions = [*output.prompt_logprobs, *output.outputs[0].logprobs]
    assert len(positions) == len(output.prompt_token_ids) + len(output.outputs[0].token_ids)
    return {(i, token): e.logprob for i, entries in enumerate(positions) for token, e in (entries or {}).items()}


def test_completions_of_one_prompt_differ_and_extend_each_other(start: Launch) -> None:
    llm, params = start(), replace(SAMPLED, seed=11)
    three = completions(llm.generate([PROMPTS[2]], replace(params, n=3)))
    assert len({tuple(tokens) for tokens in three}) == 3
    assert completions(llm.generate([PROMPTS[2]], replace(params, n=2))) == three[:2]
    assert completions(llm.generate([PROMPTS[2]], params)) == three[:1]


def test_another_seed_gives_another_text(start: Launch) -> None:
    llm = start()
    texts = [completions(llm.generate([PROMPTS[2]], replace(SAMPLED, seed=seed))) for seed in (0, 1, 2**64 - 1, -5)]
    assert len({str(text) for text in texts}) == 4


def test_an_unset_seed_is_the_engines(start: Launch) -> None:
    seeded = completions(start().generate([PROMPTS[2]], replace(SAMPLED, seed=5)))
    unset = completions(start(seed=5).generate([PROMPTS[2]], SAMPLED))
    other = completions(start(seed=6).generate([PROMPTS[2]], SAMPLED))
    assert unset == seeded != other
