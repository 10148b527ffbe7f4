"""Benchmarks on a small engine with little room, and searches over stand-in times."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from npu_zoo import LLM
from npu_zoo.engine.prompting import load_tokenizer
from npu_zoo.evaluation.offline import benchmark as benchmarks
from npu_zoo.evaluation.offline.benchmark import OfflineBenchmark
from npu_zoo.evaluation.offline.cases import Case
from npu_zoo.evaluation.offline.results import CaseResult, NotRun, OfflineBody, Sample
from npu_zoo.evaluation.offline.room import Room
from npu_zoo.evaluation.offline.samples import CaseError, PreemptedError, RandomPrompts, ordinary_ids, run_batch
from npu_zoo.testing.checkpoints import write_checkpoint

BLOCK, BLOCKS = 4, 12


class Heard:
    """A listener that keeps what it hears, and may interrupt."""

    def __init__(self, interrupt_at: tuple[Case, int] | None = None) -> None:
        self.begun: list[tuple[Case, int, int]] = []
        self.tokens = self.first_tokens = 0
        self.results: list[CaseResult] = []
        self.reasons: list[str] = []
        self._interrupt_at = interrupt_at

    def begin(self, case: Case, number: int, output: int) -> None:
        self.begun.append((case, number, output))

    def step(self, first_tokens: int, tokens: int) -> None:
        self.first_tokens += first_tokens
        self.tokens += tokens
        if self.begun[-1][:2] == self._interrupt_at:
            raise KeyboardInterrupt

    def finished(self, result: CaseResult) -> None:
        self.results.append(result)

    def refused(self, case: NotRun) -> None:
        self.reasons.append(case.reason)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"), seed=1, added_tokens=("<|EOT|>",))


@pytest.fixture(scope="module")
def start(weights: Path) -> Callable[..., LLM]:
    def started(**options: Any) -> LLM:
        defaults = {"dtype": "float32", "hardware": "cpu", "threads": 1, "max_model_len": 32, "max_num_seqs": 8}
        return LLM("deepseek_coder:custom", weights=str(weights), **{**defaults, **options})

    return started


@pytest.fixture(scope="module")
def llm(start: Callable[..., LLM]) -> Iterator[LLM]:
    """An engine with :data:`BLOCKS` blocks of :data:`BLOCK` tokens."""
    bytes_per_token = 2 * 2 * 2 * 16 * 4  # layers, keys and values, heads, their size, float32
    with start(block_size=BLOCK, kv_cache_memory=BLOCKS * BLOCK * bytes_per_token) as llm:
        assert llm.engine.explain()["kv_cache_tokens"] == BLOCKS * BLOCK
        yield llm


def ignore(first_tokens: int, tokens: int) -> None:
    pass


def test_prompts_are_of_ordinary_tokens_and_never_the_same_twice(llm: LLM) -> None:
    config = llm.engine.config
    ids = ordinary_ids(config)
    assert set(config.stop_token_ids).isdisjoint(ids)
    tokenizer = load_tokenizer(config)
    texts = {i: tokenizer.token_text(i) for i in range(tokenizer.vocab_size)}
    special = [i for i, text in texts.items() if text in ("<s>", "</s>", "<|EOT|>")]
    assert len(special) == 3
    assert ids == [i for i in texts if i not in special]
    case = Case(8, 4, 3)
    drawn = [RandomPrompts(ids, seed).draw(case, number) for seed in (0, 1) for number in (0, 1)]
    assert all(len(prompt) == 8 for batch in drawn for prompt in batch)
    assert len({tuple(prompt) for batch in drawn for prompt in batch}) == 12
    assert RandomPrompts(ids, 1).draw(case, 1) == drawn[3]


def test_cases_run_warm_and_whole(llm: LLM) -> None:
    heard, kept = Heard(), []
    benchmark = OfflineBenchmark(llm.engine, 2, 0, heard, kept.append)
    benchmark.run([Case(9, 6, 3), Case(2, 1, 2)])
    large, small = (Case(9, 6, 3), Case(2, 1, 2))
    assert heard.begun == [(large, 0, 4), (large, 1, 6), (large, 2, 6), (small, 0, 1), (small, 1, 1), (small, 2, 1)]
    assert heard.tokens == 3 * (4 + 6 + 6) + 2 * 3
    assert heard.first_tokens == 3 * 3 + 2 * 3
    assert [result.case for result in benchmark.body.cases] == [large, small]
    for result in benchmark.body.cases:
        assert len(result.samples) == 2
        for sample in result.samples:
            assert sum(sample.tokens) == result.batch * result.output
            assert list(sample.steps) == sorted(sample.steps)
            assert set(sample.first_tokens) <= set(sample.steps)
    assert [len(body.cases) for body in kept] == [1, 2]
    assert kept[-1] is benchmark.body


def test_what_does_not_fit_says_what_would_and_the_others_run(llm: LLM) -> None:
    heard = Heard()
    benchmark = OfflineBenchmark(llm.engine, 1, 0, heard)
    benchmark.run([Case(24, 24, 1), Case(9, 8, 4), Case(2, 2, 9), Case(4, 4, 2)])
    assert [refused.case for refused in benchmark.body.not_run] == [Case(24, 24, 1), Case(9, 8, 4), Case(2, 2, 9)]
    assert [result.case for result in benchmark.body.cases] == [Case(4, 4, 2)]
    too_long, too_many, too_wide = (refused.reason for refused in benchmark.body.not_run)
    assert "more than the 32" in too_long
    assert "[16,16] would fit" in too_long
    assert "64 tokens, and there is room for 48; batch 3 or 13 tokens each would fit" in too_many
    assert "--max-num-seqs 8" in too_wide
    assert heard.reasons == [too_long, too_many, too_wide]


@pytest.mark.parametrize("attention", ["paged", "flash"])
def test_the_room_is_what_runs_without_preemption(start: Callable[..., LLM], llm: LLM, attention: str) -> None:
    small = {"attention": "flash", "kv_cache_memory": "50KB"}
    with start(**small) if attention == "flash" else contextlib.nullcontext(llm) as other:
        engine, ids = other.engine, ordinary_ids(other.engine.config)
        room = Room.of(engine)
        for length in (6, 13, 14, 32):
            batch = room.largest_batch(length)
            assert batch >= 1
            assert room.longest(batch) >= length > room.longest(batch + 1)
            case = Case(4, length - 4, batch)
            assert room.refusal(case) is None
            run_batch(engine, RandomPrompts(ids, length).draw(case, 0), case.output, ignore)
            more = case._replace(batch=batch + 1)
            assert room.refusal(more) is not None
            if attention == "paged" and batch < 8:
                with pytest.raises(PreemptedError, match="did not run at once"):
                    run_batch(engine, RandomPrompts(ids, length).draw(more, 0), more.output, ignore)


def test_prompts_from_the_prefix_cache_are_no_measurement(llm: LLM) -> None:
    prompts = RandomPrompts(ordinary_ids(llm.engine.config), 77).draw(Case(9, 2, 2), 0)
    run_batch(llm.engine, prompts, 2, ignore)
    with pytest.raises(CaseError, match="16 prompt tokens came from the prefix cache"):
        run_batch(llm.engine, prompts, 2, ignore)


@pytest.mark.parametrize("error", [RuntimeError("DefaultCPUAllocator: can't allocate memory"), MemoryError()])
def test_a_step_without_memory_ends_its_case_alone(llm: LLM, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    step, running = llm.engine.step, llm.engine.stats

    def limited() -> Any:
        outputs = step()
        if running().num_running >= 3:
            raise error
        return outputs

    monkeypatch.setattr(llm.engine, "step", limited)
    benchmark = OfflineBenchmark(llm.engine, 1, 5, Heard())
    benchmark.run([Case(3, 4, 3), Case(3, 4, 2)])
    assert [refused.case for refused in benchmark.body.not_run] == [Case(3, 4, 3)]
    assert "a step ran out of memory (" in benchmark.body.not_run[0].reason
    assert [result.case for result in benchmark.body.cases] == [Case(3, 4, 2)]
    benchmark.search([Case(2, 6, 1)], 1e6, 8)
    assert [(s.largest_batch, s.limited_by) for s in benchmark.body.searches] == [(2, "memory")]
    assert running().num_running == 0


def test_other_errors_of_a_step_are_not_hidden(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> Any:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(llm.engine, "step", fail)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        OfflineBenchmark(llm.engine, 1, 0, Heard()).run([Case(3, 4, 2)])
    assert not llm.engine.has_unfinished_requests()


def test_an_interrupt_keeps_what_has_finished_and_leaves_the_engine_empty(llm: LLM) -> None:
    cases = [Case(4, 8, 2), Case(4, 4, 2)]
    heard, kept = Heard(interrupt_at=(cases[1], 1)), [OfflineBody()]
    benchmark = OfflineBenchmark(llm.engine, 1, 0, heard, kept.append)
    with pytest.raises(KeyboardInterrupt):
        benchmark.run(cases)
    assert [result.case for result in kept[-1].cases] == cases[:1]
    assert not llm.engine.has_unfinished_requests()
    assert llm.engine.stats().num_running == 0


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[int], float]], list[int]]:
    """Has batches take a time of their size in place of running; gives the sizes that were tried."""

    def install(step_of: Callable[[int], float]) -> list[int]:
        tried: list[int] = []

        def run(engine: Any, prompts: list[list[int]], output: int, on_step: Any) -> Sample:
            batch = len(prompts)
            if output > 4:  # no warm-up
                tried.append(batch)
            step = step_of(batch)
            ends = tuple(1.0 + number * step for number in range(output))
            return Sample(first_tokens=(1.0,) * batch, steps=ends, tokens=(batch,) * output)

        monkeypatch.setattr(benchmarks, "run_batch", run)
        return tried

    return install


def test_a_search_finds_the_largest_batch_under_a_latency(llm: LLM, timed: Any) -> None:
    tried = timed(lambda batch: 0.010 + 0.002 * batch)
    heard = Heard()
    benchmark = OfflineBenchmark(llm.engine, 1, 0, heard)
    benchmark.search([Case(2, 6, 1)], 20.5, 8)
    (search,) = benchmark.body.searches
    assert (search.largest_batch, search.limited_by) == (5, "latency")
    assert [probe.batch for probe in search.probes] == tried == [result.batch for result in heard.results]
    assert [result.case for result in benchmark.body.cases] == [Case(2, 6, 5)]


def test_memory_and_the_limit_given_bound_a_search(llm: LLM, timed: Any) -> None:
    timed(lambda batch: 0.001)
    benchmark = OfflineBenchmark(llm.engine, 1, 0, Heard())
    benchmark.search([Case(9, 8, 1), Case(2, 6, 1)], 20, 5)
    found = [(search.largest_batch, search.limited_by) for search in benchmark.body.searches]
    assert found == [(3, "memory"), (5, "batch_limit")]


def test_a_batch_that_loses_its_room_bounds_a_search(llm: LLM, timed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def step_of(batch: int) -> float:
        if batch > 2:
            raise PreemptedError("no room")
        return 0.001

    timed(step_of)
    benchmark = OfflineBenchmark(llm.engine, 1, 0, Heard())
    benchmark.search([Case(2, 6, 1)], 20, 8)
    (search,) = benchmark.body.searches
    assert (search.largest_batch, search.limited_by) == (2, "memory")


def test_an_output_too_short_for_all_at_once_bounds_a_search(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(engine: Any, prompts: list[list[int]], output: int, on_step: Any) -> Sample:
        batch = len(prompts)
        tokens = (batch,) * output if batch < 4 else (1, *(batch - 1,) * output)
        ends = tuple(1.0 + 0.001 * number for number in range(len(tokens)))
        return Sample(first_tokens=(1.0,) * batch, steps=ends, tokens=tokens)

    monkeypatch.setattr(benchmarks, "run_batch", run)
    benchmark = OfflineBenchmark(llm.engine, 1, 0, Heard())
    benchmark.search([Case(2, 6, 1)], 20, 8)
    (search,) = benchmark.body.searches
    assert (search.largest_batch, search.limited_by) == (3, "output")


def test_a_search_without_an_answer_says_so(llm: LLM, timed: Any) -> None:
    timed(lambda batch: 1e9)
    benchmark = OfflineBenchmark(llm.engine, 1, 0, Heard())
    benchmark.search([Case(2, 1, 1), Case(20, 20, 1), Case(2, 6, 1)], 20, 8)
    assert [search.largest_batch for search in benchmark.body.searches] == [0]
    assert benchmark.body.cases == ()
    assert "give 2 or more" in benchmark.body.not_run[0].reason
    assert "would fit" in benchmark.body.not_run[1].reason


def test_an_interrupted_search_keeps_its_probes(llm: LLM, timed: Any) -> None:
    def step_of(batch: int) -> float:
        if batch == 4:
            raise KeyboardInterrupt
        return 0.001

    timed(step_of)
    benchmark = OfflineBenchmark(llm.engine, 1, 0, Heard())
    with pytest.raises(KeyboardInterrupt):
        benchmark.search([Case(2, 6, 1)], 20, 8)
    (search,) = benchmark.body.searches
    assert (search.largest_batch, search.limited_by, len(search.probes)) == (2, "interrupted", 2)
