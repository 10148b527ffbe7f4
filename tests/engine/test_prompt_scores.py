"""What is told of a prompt: from which position on, with logits, and what of it the prefix cache may serve."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from npu_zoo import LLM, SamplingParams
from npu_zoo.core.errors import UsageError

PROMPT = [5 + number * 7 % 90 for number in range(70)]
WHOLE = SamplingParams(temperature=0, max_tokens=1, logprobs=1, prompt_logprobs=1, prompt_logits=True)


@pytest.fixture(scope="module", params=[{}, {"max_num_batched_tokens": 16, "max_num_seqs": 2}], ids=["whole", "chunks"])
def scorer(request: pytest.FixtureRequest, launch: Callable[..., LLM], checkpoint: Path) -> LLM:
    return launch(checkpoint, **request.param)


def test_logits_give_the_logprobs(scorer: LLM) -> None:
    output = scorer.generate([PROMPT], WHOLE)[0]
    logits = output.prompt_logits
    assert logits.dtype == np.float32
    assert logits.shape == (len(PROMPT), scorer.engine.config.model_config.vocab_size)
    logprobs = logits - np.logaddexp.reduce(logits.astype(np.float64), axis=1, keepdims=True)
    told = [*(output.prompt_logprobs or [])[1:], (output.outputs[0].logprobs or [])[0]]
    for row, token, entries in zip(logprobs, [*PROMPT[1:], output.outputs[0].token_ids[0]], told, strict=True):
        assert entries is not None
        assert entries[token].logprob == pytest.approx(row[token], abs=1e-4)
        assert entries[token].rank == 1 + int((row > row[token]).sum())


@pytest.mark.parametrize("start", [1, 2, 33, 69, 70, 500])
def test_what_stands_before_the_start_is_left_out(scorer: LLM, start: int) -> None:
    whole, part = scorer.generate([PROMPT], WHOLE)[0], replace(WHOLE, prompt_logprobs_start=start)
    output = scorer.generate([PROMPT], part)[0]
    first = min(start, len(PROMPT))
    assert output.prompt_logprobs is not None
    assert whole.prompt_logprobs is not None
    assert output.prompt_logprobs[:first] == [None] * first
    for entries, expected in zip(output.prompt_logprobs[first:], whole.prompt_logprobs[first:], strict=True):
        assert entries is not None
        assert expected is not None
        token = next(iter(expected))
        assert entries[token].logprob == pytest.approx(expected[token].logprob, abs=1e-4)
    np.testing.assert_allclose(output.prompt_logits, whole.prompt_logits[first - 1 :], atol=1e-4)
    assert output.metrics.cached_tokens == (first - 1) // 16 * 16


def test_a_request_without_it_has_no_logits(scorer: LLM) -> None:
    assert scorer.generate([PROMPT], replace(WHOLE, prompt_logits=False))[0].prompt_logits is None


def test_logits_alone_are_refused() -> None:
    with pytest.raises(UsageError, match="prompt_logits come with prompt_logprobs"):
        SamplingParams(prompt_logits=True)
