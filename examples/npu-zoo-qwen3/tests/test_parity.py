"""Tiny checkpoints against transformers: greedy tokens, and their log-probabilities within 1e-4 in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from npu_zoo import LLM, SamplingParams

from .conftest import Launch, Write, change_config, reference_of

TOLERANCE = 1e-4
TOKENS = 10
GREEDY = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, logprobs=2)
PROMPTS = [[7], list(range(20, 36)), list(range(40, 90)), [*range(40, 80), 5, 6]]
"""Lengths around the block size of 16, two of them with a common beginning."""

YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32}
CASES: dict[str, dict[str, Any]] = {
    "untied": {},
    "tied": {"tie_word_embeddings": True, "seed": 1},
    "one-key-value-head": {"num_key_value_heads": 1, "seed": 2},
    "wide-heads": {"head_dim": 64, "hidden_size": 48, "num_attention_heads": 3, "num_key_value_heads": 3, "seed": 3},
    "yarn": {"rope_parameters": YARN, "max_position_embeddings": 128, "seed": 4},
}


def assert_equals_transformers(llm: LLM, reference: Any, prompts: list[list[int]]) -> None:
    for output in llm.generate(prompts, GREEDY):
        completion = output.outputs[0]
        with torch.no_grad():
            logits = reference(torch.tensor([[*output.prompt_token_ids, *completion.token_ids]])).logits[0]
        due = logits.log_softmax(-1)[len(output.prompt_token_ids) - 1 : -1]
        assert completion.token_ids == due.argmax(-1).tolist()
        assert completion.logprobs is not None
        for row, entries in zip(due, completion.logprobs, strict=True):
            assert set(row.topk(2).indices.tolist()) <= set(entries)
            for token, entry in entries.items():
                assert entry.logprob == pytest.approx(float(row[token]), abs=TOLERANCE)


@pytest.mark.parametrize("case", CASES)
def test_in_a_batch(case: str, write: Write, launch: Launch) -> None:
    directory = write(**CASES[case])
    options = {"max_model_len": 128} if case == "yarn" else {}
    assert_equals_transformers(launch(directory, **options), reference_of(directory), PROMPTS)


@pytest.fixture(scope="module")
def checkpoint(write: Write) -> Path:
    return write()


def test_alone_and_from_the_prefix_cache(checkpoint: Path, launch: Launch) -> None:
    llm, reference = launch(checkpoint), reference_of(checkpoint)
    for prompt in (*PROMPTS, PROMPTS[2]):
        assert_equals_transformers(llm, reference, [prompt])


def test_contiguous_and_in_chunks(checkpoint: Path, launch: Launch) -> None:
    reference = reference_of(checkpoint)
    assert_equals_transformers(launch(checkpoint, attention="flash"), reference, PROMPTS)
    assert_equals_transformers(launch(checkpoint, max_num_batched_tokens=24), reference, PROMPTS)


def test_on_two_ranks(write: Write, launch: Launch) -> None:
    directory = write(tie_word_embeddings=True, seed=5)
    with launch(directory, tensor_parallel_size=2) as llm:
        assert_equals_transformers(llm, reference_of(directory), PROMPTS)


def test_a_checkpoint_that_leaves_the_head_size_out_has_transformers_own(write: Write, launch: Launch) -> None:
    directory = change_config(write(head_dim=128, seed=6), head_dim=None)
    assert_equals_transformers(launch(directory), reference_of(directory), PROMPTS)
