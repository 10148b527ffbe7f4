"""What the host does in a step, counted: it does not grow with what was there before."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from npu_zoo import LLM, SamplingParams
from npu_zoo.core.engine import CompletionOutput
from npu_zoo.engine import host_rows
from npu_zoo.engine.block_manager import BlockManager
from npu_zoo.engine.block_table import BlockTable
from npu_zoo.engine.engine import NativeEngine
from npu_zoo.engine.penalties import SeenTokens
from npu_zoo.engine.sampler import Sampler
from npu_zoo.engine.sequence import Sequence

VOCAB = 512


def sequence_of(length: int, **params: Any) -> Sequence:
    tokens = [number * 7 % VOCAB for number in range(length)]
    return Sequence(0, tokens, length, SamplingParams(**params), 10_000, 0, CompletionOutput(0))


@pytest.fixture
def tokens_looked_up(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens each call made a tensor of."""
    counted: list[int] = []
    known = SeenTokens._known

    def counting(self: SeenTokens, token_ids: list[int]) -> Tensor:
        counted.append(len(token_ids))
        return known(self, token_ids)

    monkeypatch.setattr(SeenTokens, "_known", counting)
    return counted


@pytest.mark.parametrize("length", [4, 4000])
def test_penalties_count_new_tokens_alone(tokens_looked_up: list[int], length: int) -> None:
    sequence = sequence_of(length, temperature=0.0, repetition_penalty=1.3, frequency_penalty=0.2)
    sampler = Sampler()
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(0))
    sequence.token_ids += sampler.sample(logits, [sequence], [()]).token_ids
    tokens_looked_up.clear()
    for _ in range(20):
        sequence.token_ids += sampler.sample(logits, [sequence], [()]).token_ids
    assert tokens_looked_up == [1] * 20


def test_penalties_kept_from_step_to_step_are_those_computed_anew() -> None:
    generator = torch.Generator().manual_seed(1)
    params: dict[str, Any] = {
        "temperature": 0.0,
        "repetition_penalty": 1.4,
        "presence_penalty": 0.3,
        "frequency_penalty": 0.2,
    }
    sequence = sequence_of(30, **params)
    for _ in range(40):
        logits = torch.randn(1, VOCAB, generator=generator) * 2
        fresh = replace(sequence, token_ids=list(sequence.token_ids), seen=None)  # remembers nothing
        tokens = [Sampler().sample(logits, [one], [()]).token_ids for one in (sequence, fresh)]
        assert tokens[0] == tokens[1]
        sequence.token_ids += tokens[0]
    assert sequence.seen is not None


@pytest.mark.parametrize("rows", [1, 3, 64])
def test_the_greedy_token_is_the_first_of_the_largest(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    monkeypatch.setattr(host_rows, "_CACHED_VALUES", 4 * VOCAB)
    logits = torch.randint(-3, 4, (rows, VOCAB), generator=torch.Generator().manual_seed(rows)).bfloat16()
    expected = [row.index(max(row)) for row in logits.tolist()]
    assert host_rows.argmax(logits) == expected


@pytest.mark.parametrize("count", [0, 1, 5, VOCAB])
def test_the_largest_places_are_those_of_a_stable_sort(count: int) -> None:
    row = torch.randint(-9, 9, (VOCAB,), generator=torch.Generator().manual_seed(count)).float()
    assert host_rows.largest(row.numpy(), count) == row.sort(descending=True, stable=True).indices[:count].tolist()


class CountedTokens(list[int]):
    """A list that counts how many of its items are looked at."""

    looked_at = 0

    def __getitem__(self, index: Any) -> Any:
        found = super().__getitem__(index)
        self.looked_at += len(found) if isinstance(index, slice) else 1
        return found

    def __iter__(self) -> Iterator[int]:
        self.looked_at += len(self)
        return super().__iter__()

    def __contains__(self, token: object) -> bool:
        self.looked_at += len(self)
        return super().__contains__(token)


@pytest.fixture(scope="module")
def long_llm(launch: Callable[..., LLM], checkpoint: Path) -> LLM:
    return launch(checkpoint, max_model_len=512, max_num_seqs=4, kv_cache_memory="32MiB")


def prefilled(llm: LLM, prompts: list[int], **params: Any) -> NativeEngine:
    """An engine with running requests of prompts of some lengths, each with two tokens or more of output."""
    engine = llm.engine
    assert isinstance(engine, NativeEngine)
    sampling = SamplingParams(**{"temperature": 0.0, "ignore_eos": True, "max_tokens": None, **params})
    for number, length in enumerate(prompts):
        engine.add_request(f"running {number}", [(number + place) % 90 + 5 for place in range(length)], sampling)
    while (
        not all(sequence.num_output_tokens > 1 for sequence in engine.scheduler.running) or engine.scheduler.num_waiting
    ):
        engine.step()
    return engine


def tokens_looked_at(engine: NativeEngine, steps: int) -> int:
    """How many items of the running sequences' tokens some steps look at."""
    (sequence,) = engine.scheduler.running
    counted = sequence.token_ids = CountedTokens(sequence.token_ids)
    for _ in range(steps):
        engine.step()
    return counted.looked_at


PARAMS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "drawn": {"temperature": 0.7, "top_p": 0.9, "seed": 1},
    "penalties": {"repetition_penalty": 1.2, "frequency_penalty": 0.1},
    "log-probabilities": {"logprobs": 3},
    "stop strings": {"stop": ("never there",)},
}


@pytest.mark.parametrize("name", PARAMS)
def test_a_decode_step_looks_at_no_more_tokens_of_a_longer_prompt(long_llm: LLM, name: str) -> None:
    found = []
    for length in (17, 401):  # both one token into a block, of which the steps fill as many
        engine = prefilled(long_llm, [length], **PARAMS[name])
        found.append(tokens_looked_at(engine, 40))
        engine.abort_request("running 0")
    assert found[0] == found[1] <= 40 * 4


def test_a_decode_step_goes_through_no_block_table(long_llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = prefilled(long_llm, [400, 30])
    went_through: list[int] = []
    plain = BlockTable.__iter__

    def counting(self: BlockTable) -> Iterator[int]:
        went_through.append(len(self))
        return plain(self)

    monkeypatch.setattr(BlockTable, "__iter__", counting)
    for _ in range(20):
        engine.step()
    for number in range(2):
        engine.abort_request(f"running {number}")
    assert not went_through


class Books(Counter[str]):
    """Counts what a block manager does."""

    def watch(self, kv: BlockManager, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("_digest", "_acquire", "attach_prefix", "reserve"):
            monkeypatch.setattr(kv, name, self._counting(name, getattr(kv, name)))

    def _counting(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any) -> Any:
            self[name] += 1
            return call(*arguments)

        return counted


@pytest.mark.parametrize("waiting", [0, 1, 500])
def test_a_step_does_nothing_for_those_that_wait(
    launch: Callable[..., LLM], checkpoint: Path, monkeypatch: pytest.MonkeyPatch, waiting: int
) -> None:
    llm = launch(checkpoint, max_model_len=512, max_num_seqs=8, kv_cache_memory="256KiB")
    engine = prefilled(llm, [300])
    assert isinstance(engine.kv, BlockManager)
    (running,) = engine.scheduler.running
    assert engine.kv.reserve(running, 512)  # all there is
    for number in range(waiting):  # all begin as the running one does, whose blocks they would share
        prompt = [*running.token_ids[:300], *([number % 90 + 5] * 150)]
        engine.add_request(f"waiting {number}", prompt, SamplingParams(max_tokens=4, temperature=0.0))
    engine.step()  # finds that the first of them has no room
    assert engine.scheduler.num_waiting == waiting
    books = Books()
    books.watch(engine.kv, monkeypatch)
    for _ in range(32):
        engine.step()
    # One reservation a step, and a digest for each block that was filled.
    assert (books["attach_prefix"], books["_acquire"], books["reserve"]) == (0, 0, 32)
    assert books["_digest"] <= 3
    engine.abort_request("running 0")
    finished = set()
    while engine.has_unfinished_requests():
        finished |= {output.request_id for output in engine.step() if output.finished}
    assert len(finished) == waiting


def test_drafts_are_counted_apart() -> None:
    sequence = sequence_of(20, temperature=0.0, repetition_penalty=1.4, presence_penalty=0.3, frequency_penalty=0.2)
    sequence.token_ids += [3, 3, 9]
    logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(2))

    def penalised(seen: SeenTokens) -> list[float]:
        row = logits.clone()
        seen.penalise(row, sequence.params)
        values: list[float] = row.tolist()
        return values

    cpu = torch.device("cpu")
    own = sequence.seen_tokens(VOCAB, cpu)
    before = penalised(own)
    drafted = penalised(own.followed_by((3, 11)))
    assert penalised(own) == before
    sequence.token_ids += [3, 11]
    assert penalised(sequence.seen_tokens(VOCAB, cpu)) == drafted != before
