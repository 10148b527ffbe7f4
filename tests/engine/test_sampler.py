"""Draws against closed forms and a brute-force distribution in numpy."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence as SequenceOf
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from npu_zoo import SamplingParams
from npu_zoo.core.engine import CompletionOutput
from npu_zoo.engine import sampler as sampler_module
from npu_zoo.engine.sampler import Sampler, top_logprobs
from npu_zoo.engine.sequence import Sequence

Tokens = SequenceOf[int]
DRAWS = 3000
LOGITS = np.array([0.3, -1.2, 1.6, 0.9, -0.4, 1.1, -0.9, 0.1, 1.3, -0.7])
"""All different, and none so small that 1,000 draws would miss it."""


def sequence_of(prompt: Tokens = (0,), output: Tokens = (), index: int = 0, **params: Any) -> Sequence:
    sampling = SamplingParams(**params)
    seed = sampling.seed or 0
    return Sequence(index, [*prompt, *output], len(prompt), sampling, 16, seed, CompletionOutput(index))


def draw(logits: np.ndarray, count: int = DRAWS, **params: Any) -> list[int]:
    """The tokens that as many seeds draw from one row of logits."""
    sequences = [sequence_of(seed=seed, **params) for seed in range(count)]
    return sample(np.broadcast_to(logits, (count, len(logits))), sequences)


def sample(logits: Any, sequences: list[Sequence], held: tuple[int, ...] = ()) -> list[int]:
    rows = torch.tensor(np.array(logits), dtype=torch.float32)
    return Sampler().sample(rows, sequences, [held] * len(sequences)).token_ids


def distribution(
    logits: np.ndarray, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> np.ndarray:
    """What is to be drawn from: min_p, then top_k, then top_p, each on what the one before has left."""
    weights = np.exp(logits / temperature)
    weights[weights < min_p * weights.max()] = 0.0
    order = np.argsort(-weights)
    if top_k > 0:
        weights[order[top_k:]] = 0.0
    before = 0.0
    for token in order:
        share = weights[token] / weights.sum() if before < 1 else 0.0
        if before >= top_p:
            weights[order[list(order).index(token) :]] = 0.0
            break
        before += share
    return weights / weights.sum()


def assert_drawn_from(drawn: list[int], expected: np.ndarray) -> None:
    """Pearson's statistic is not far in its tail; the seeds are fixed, so it never varies."""
    observed = np.bincount(drawn, minlength=len(expected))
    assert observed[expected == 0].sum() == 0
    due = expected[expected > 0] * len(drawn)
    statistic = ((observed[expected > 0] - due) ** 2 / due).sum()
    freedom = len(due) - 1
    assert statistic <= freedom + 5 * np.sqrt(2 * freedom) + 10


def test_the_brute_force_distribution() -> None:
    four = np.log([0.4, 0.3, 0.2, 0.1])
    assert distribution(four, top_p=0.65) == pytest.approx([4 / 7, 3 / 7, 0, 0])
    assert distribution(four, top_k=3) == pytest.approx([4 / 9, 3 / 9, 2 / 9, 0])
    assert distribution(four, min_p=0.6) == pytest.approx([4 / 7, 3 / 7, 0, 0])
    assert distribution(four, top_k=2, top_p=0.5) == pytest.approx([1, 0, 0, 0])


def test_greedy_takes_the_most_likely() -> None:
    rows = np.random.default_rng(0).normal(size=(20, 50))
    assert sample(rows, [sequence_of(temperature=0) for _ in rows]) == rows.argmax(-1).tolist()


def test_a_low_temperature_is_greedy_and_a_high_one_uniform() -> None:
    assert set(draw(LOGITS, 200, temperature=1e-6)) == {2}
    assert_drawn_from(draw(LOGITS, temperature=1e6), np.full(10, 0.1))


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.7},
        {"temperature": 1.8},
        {"top_k": 1},
        {"top_k": 3},
        {"top_k": -1},
        {"top_k": 10},
        {"top_k": 99},
        {"top_p": 1e-9},
        {"top_p": 1e-60},
        {"top_p": 0.3},
        {"top_p": 0.73},
        {"min_p": 0.33},
        {"min_p": 1.0},
        {"top_k": 6, "top_p": 0.55},
        {"min_p": 0.15, "top_k": 7, "top_p": 0.9, "temperature": 1.4},
    ],
    ids=str,
)
def test_the_drawn_distribution(params: dict[str, Any]) -> None:
    assert_drawn_from(draw(LOGITS, **params), distribution(LOGITS, **params))


@given(
    order=st.permutations(range(10)),
    top_k=st.integers(-1, 12),
    top_p=st.sampled_from((0.05, 0.21, 0.47, 0.66, 0.87, 0.95, 1.0)),
    min_p=st.sampled_from((0.0, 0.07, 0.18, 0.43, 0.91)),
    temperature=st.sampled_from((0.8, 1.0, 2.0)),
)
def test_the_set_that_is_drawn_from(order: list[int], **params: Any) -> None:
    logits = LOGITS[order]
    assert set(draw(logits, 1000, **params)) == set(np.flatnonzero(distribution(logits, **params)))


def test_rows_of_a_batch_keep_their_own_parameters() -> None:
    kinds: list[dict[str, Any]] = [{"temperature": 0}, {"top_k": 2}, {"top_p": 0.4}, {"min_p": 0.5}, {}]
    alone = [draw(LOGITS, 50, **kind) for kind in kinds]
    sequences = [sequence_of(seed=seed, **kind) for seed in range(50) for kind in kinds]
    together = sample(np.broadcast_to(LOGITS, (250, 10)), sequences)
    assert [together[i::5] for i in range(5)] == alone


def test_another_rows_nucleus_cuts_no_tail(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sum of float32 probabilities reaches 1 before the last token; that token may be drawn all the same."""
    monkeypatch.setattr(sampler_module, "_uniform", lambda sequence: 1 - 2.0**-53)
    logits = [[0.0, -30.0], [0.0, -30.0]]
    assert sample(logits, [sequence_of(), sequence_of()]) == [1, 1]
    assert sample(logits, [sequence_of(), sequence_of(top_k=1)]) == [1, 0]


def test_the_largest_draw_stays_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    digest = SimpleNamespace(digest=lambda: b"\xff" * 8)
    monkeypatch.setattr(hashlib, "blake2b", lambda *args, **kwargs: digest)
    assert sample([[5.0, 0.0, 0.0]], [sequence_of(top_k=1)]) == [0]


def test_the_smallest_draw_is_of_a_token_that_was_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampler_module, "_uniform", lambda sequence: 0.0)
    assert sample([[0.0, 5.0, 0.0]], [sequence_of(top_k=1)]) == [1]


def test_a_draw_depends_on_seed_completion_and_position() -> None:
    uniform = np.zeros(1000)
    cases = [{"seed": 1}, {"seed": 2}, {"seed": 1, "index": 1}, {"seed": 1, "output": [5]}, {"seed": 1, "output": [6]}]
    drawn = [sample([uniform], [sequence_of(**case)])[0] for case in cases]
    assert len(set(drawn[:4])) == 4
    assert drawn[3] == drawn[4]


@given(
    logits=st.lists(st.floats(-4, 4, width=16), min_size=8, max_size=8),
    prompt=st.lists(st.integers(0, 7), min_size=1, max_size=6),
    output=st.lists(st.integers(0, 7), max_size=6),
    repetition=st.sampled_from((1.0, 0.5, 1.3, 2.0)),
    presence=st.sampled_from((0.0, -1.5, 0.75)),
    frequency=st.sampled_from((0.0, -0.6, 0.4)),
)
def test_penalties(
    logits: list[float], prompt: list[int], output: list[int], repetition: float, presence: float, frequency: float
) -> None:
    due = np.array(logits) + np.linspace(0, 1e-2, 8)
    given_logits = due.copy()
    for token in set(prompt) | set(output):
        due[token] = due[token] / repetition if due[token] > 0 else due[token] * repetition
    for token in range(8):
        due[token] -= frequency * output.count(token) + presence * (token in output)
    sequence = sequence_of(
        prompt,
        output,
        temperature=0,
        repetition_penalty=repetition,
        presence_penalty=presence,
        frequency_penalty=frequency,
    )
    assert due[sample([given_logits], [sequence])[0]] == pytest.approx(due.max(), abs=1e-5)


def test_penalties_of_one_row_leave_the_others_alone() -> None:
    rows = torch.tensor([[2.0, 1.0], [2.0, 1.0]])
    sequences = [sequence_of([0], [0], temperature=0, repetition_penalty=4.0), sequence_of([0], [0], temperature=0)]
    assert Sampler().sample(rows, sequences, [(), ()]).token_ids == [1, 0]
    assert rows.tolist() == [[2.0, 1.0], [2.0, 1.0]]


@pytest.mark.parametrize("temperature", [0, 1])
def test_ids_are_held_back_until_min_tokens(temperature: float) -> None:
    logits = [[9.0, 1.0, 8.0, 0.0]]
    params = {"temperature": temperature, "min_tokens": 2, "seed": 0}
    for output in ([], [3]):
        assert sample(logits, [sequence_of(output=output, **params)], held=(0, 2, 77)) in ([1], [3])
    assert sample(logits, [sequence_of(output=[3, 3], **params)], held=(0, 2, 77)) in ([0], [2])


def logprobs_of(logits: Tensor, chosen: int, wanted: int) -> Any:
    return top_logprobs(logits, [chosen], [wanted])[0]


def test_log_probabilities_are_of_the_plain_logits() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, -1.0]])
    params = {"temperature": 0.2, "top_k": 1, "repetition_penalty": 1.5, "logprobs": 2}
    sampled = Sampler().sample(logits, [sequence_of(output=[1], **params)], [()])
    entry = sampled.logprobs[0]
    assert entry is not None
    due = logits[0].log_softmax(-1).tolist()
    assert entry.chosen == pytest.approx(
        (sampled.token_ids[0], due[sampled.token_ids[0]], 1 + (sampled.token_ids[0] != 1))
    )
    assert [token for token, _ in entry.top] == [1, 2]
    assert [value for _, value in entry.top] == pytest.approx([due[1], due[2]])


@pytest.mark.parametrize(("chosen", "rank"), [(1, 1), (2, 2), (0, 3), (3, 4)])
def test_the_rank_counts_what_is_more_likely(chosen: int, rank: int) -> None:
    entry = logprobs_of(torch.tensor([[1.0, 3.0, 2.0, -1.0]]), chosen, 0)
    assert (entry.chosen[0], entry.chosen[2], entry.top) == (chosen, rank, [])


def test_more_log_probabilities_than_tokens() -> None:
    assert len(logprobs_of(torch.zeros(1, 3), 0, 20).top) == 3


def test_only_who_asks_gets_log_probabilities() -> None:
    sequences = [sequence_of(temperature=0), sequence_of(temperature=0, logprobs=0)]
    first, second = Sampler().sample(torch.zeros(2, 4), sequences, [(), ()]).logprobs
    assert first is None
    assert second is not None
