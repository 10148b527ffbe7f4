"""Alternation, ratios and failures, with processes that only keep a diary."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from npu_zoo.evaluation.peers import comparison
from npu_zoo.evaluation.peers.cases import CATALOGUE, Case
from npu_zoo.evaluation.peers.comparison import Comparison, Conditions, Step, cache_tokens
from npu_zoo.evaluation.peers.engines import InstalledEngine
from npu_zoo.evaluation.peers.process import PeerError
from npu_zoo.evaluation.peers.result import CaseResult
from npu_zoo.evaluation.peers.worker.driver import LoadOptions, Request
from npu_zoo.evaluation.peers.worker.timeline import Run

SECONDS = {"npu-zoo": 1.0, "transformers": 2.0, "vllm": 0.5}
SHORT = Case("short", "short", "decode", 2, (4, 4), (5, 5))


class FakeProcess:
    """Answers as an engine would that is as fast as :data:`SECONDS` says; fails where ``script`` tells it to."""

    def __init__(self, engine: InstalledEngine, threads: int | None, cores: Sequence[int]) -> None:
        self.name, self.started = engine.name, 100.0

    diary: list[tuple[str, str, Any]]
    fails_on: Callable[[str, str], bool]
    cached_tokens: int
    differing: str
    waves: dict[str, int]

    def __enter__(self) -> FakeProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self, *, gently: bool = True) -> None:
        self.diary.append((self.name, "close", None))

    def load(self, options: LoadOptions) -> None:
        self._do("load", options)

    def run(self, requests: list[Request], static_batch: int = 0, longest: int = 0) -> Run:
        self._do("run", requests)
        self.diary.append((self.name, "longest", longest))
        seconds, lengths = SECONDS[self.name], [request.max_tokens for request in requests]
        token_ids = [[0] * (length - 1) + [int(self.name == self.differing)] for length in lengths]
        moments = [100.0 + seconds * part for part in (0, 1, 1, 3)]
        times = (moments[0], moments[1], moments[2], len(lengths), moments[3])
        return Run(*times, lengths, self.cached_tokens, token_ids, **self.waves)

    def peak_memory(self) -> int:
        return 2**31

    def cache_bytes(self, requests: list[Request]) -> float:
        return SECONDS[self.name] * 2**10

    def _do(self, what: str, given: Any) -> None:
        self.diary.append((self.name, what, given))
        if type(self).fails_on(self.name, what):
            raise PeerError("out of memory")


class Compare:
    """Runs cases and keeps what was asked of the processes."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.process: type[FakeProcess] = type(
            "Process",
            (FakeProcess,),
            {"diary": [], "fails_on": staticmethod(lambda *_: False), "cached_tokens": 0, "differing": "", "waves": {}},
        )

    def __call__(
        self,
        *cases: Case,
        rounds: int = 2,
        engines: Sequence[str] = tuple(SECONDS),
        fewer: dict[tuple[str, str], int] | None = None,
    ) -> list[CaseResult]:
        options = {name: LoadOptions("folder", "float32", 256, kv_cache_memory=7) for name in engines}
        conditions = Conditions(rounds, 100, cache_per_token=10, fewer=fewer or {})
        found = [InstalledEngine(name) for name in engines]
        return list(Comparison(found, options, conditions, self.steps.append).run(cases))

    def of(self, what: str) -> list[tuple[str, Any]]:
        return [(name, given) for name, done, given in self.process.diary if done == what]


@pytest.fixture
def compare(monkeypatch: pytest.MonkeyPatch) -> Compare:
    found = Compare()
    monkeypatch.setattr(comparison, "PeerProcess", found.process)
    return found


def test_all_run_the_same_requests_in_changing_order(compare: Compare) -> None:
    compare(SHORT, rounds=3)
    runs = compare.of("run")
    a, b, c = SECONDS
    assert [name for name, _ in runs] == [a, b, c, *(a, b, c), *(b, c, a), *(c, a, b)]
    rounds = [[given for _, given in runs[start : start + 3]] for start in (3, 6, 9)]
    assert all(first == second == third for first, second, third in rounds)
    assert rounds[0][0] != rounds[1][0]


def test_an_engine_may_take_part_in_fewer_rounds_of_a_case(compare: Compare) -> None:
    fewer = {("vllm", "short"): 1, ("vllm", "start"): 2}
    start, short = compare(SHORT, CATALOGUE["start"], rounds=3, fewer=fewer)
    assert [set(sample) for sample in short.rounds] == [set(SECONDS), *[{"npu-zoo", "transformers"}] * 2]
    assert [len(sample) for sample in start.rounds] == [3, 3, 2]
    assert len(short.ratios("vllm", "npu-zoo")) == 1
    assert compare.steps[-1].done == compare.steps[-1].total == len(compare.steps)


def test_two_take_turns_at_being_first(compare: Compare) -> None:
    compare(SHORT, rounds=2, engines=("npu-zoo", "vllm"))
    assert [name for name, _ in compare.of("run")][2:] == ["npu-zoo", "vllm", "vllm", "npu-zoo"]


def test_engines_stay_loaded_over_cases_and_are_closed_at_the_end(compare: Compare) -> None:
    compare(SHORT, CATALOGUE["decode-1"])
    assert [name for name, _ in compare.of("load")] == list(SECONDS)
    assert sorted(name for name, _ in compare.of("close")) == sorted(SECONDS)
    assert compare.process.diary[-1][1] == "close"


def test_engines_are_closed_where_the_caller_leaves_early(compare: Compare) -> None:
    options = {"vllm": LoadOptions("folder", "float32", 256)}
    results = Comparison([InstalledEngine("vllm")], options, Conditions(1, 100)).run([SHORT, SHORT])
    next(results)
    assert compare.of("close") == []
    results.close()
    assert len(compare.of("close")) == 1


def test_figures_and_ratios(compare: Compare) -> None:
    (result,) = compare(SHORT)
    # Eight tokens after the first ones, in two of each engine's seconds.
    assert result.rounds == [{"npu-zoo": 4.0, "transformers": 2.0, "vllm": 8.0}] * 2
    assert result.ratios("transformers", "npu-zoo") == [2.0, 2.0]
    assert result.ratios("vllm", "npu-zoo") == [0.5, 0.5]
    assert "token_ids" not in result.runs[0]["vllm"]
    assert (result.runs[0]["vllm"]["start"], result.runs[0]["vllm"]["end"]) == (0.0, 1.5)


@pytest.mark.parametrize(("name", "figure", "ratio"), [("start", 2.0, 2.0), ("memory", 2.0, 1.0), ("cache", 2.0, 2.0)])
def test_fresh_processes_where_less_is_better(name: str, figure: float, ratio: float, compare: Compare) -> None:
    (result,) = compare(CATALOGUE[name], engines=("npu-zoo", "transformers"))
    assert {sample["transformers"] for sample in result.rounds} == {figure}
    assert set(result.ratios("transformers", "npu-zoo")) == {ratio}
    assert len(compare.of("load")) == len(compare.of("close")) == compare.steps[-1].total


def test_a_start_is_timed_right_after_another_of_the_same_engine(compare: Compare) -> None:
    compare(CATALOGUE["start"], rounds=2)
    runs = compare.of("run")
    a, b, c = SECONDS
    assert [name for name, _ in runs] == [a, a, b, b, c, c, *(b, b, c, c, a, a)]
    assert len(compare.of("load")) == len(runs) == len(compare.steps)


def test_npu_zoo_takes_its_cache_s_memory_as_it_is_loaded_to_stay(compare: Compare) -> None:
    compare(SHORT, CATALOGUE["start"], CATALOGUE["memory"], rounds=1, engines=("npu-zoo", "vllm"))
    loads = compare.of("load")
    assert [name for name, options in loads if options.settings] == ["npu-zoo"]
    assert loads[-2][1].settings == {"prefault_kv_cache": True}
    asked = LoadOptions("folder", "float32", 256, settings={"prefault_kv_cache": False, "seed": 3})
    assert comparison.lasting_settings("npu-zoo", asked) == {}


def test_the_memory_case_caches_no_more_than_its_work_needs(compare: Compare) -> None:
    compare(CATALOGUE["memory"], rounds=1, engines=("npu-zoo",))
    (_, requests), (_, options) = compare.of("run")[0], compare.of("load")[0]
    assert options.kv_cache_memory == 10 * cache_tokens(requests)
    assert options.max_model_len == 256
    shorter = CATALOGUE["memory-1"]
    compare(shorter, rounds=1, engines=("npu-zoo",))
    assert compare.of("load")[-1][1].max_model_len == shorter.longest == 128 + 64
    assert cache_tokens(requests) > sum(len(request.prompt) + request.max_tokens for request in requests)


def test_an_engine_that_fails_in_a_case_is_out_of_it_alone(compare: Compare) -> None:
    runs = iter(range(100))
    compare.process.fails_on = staticmethod(  # type: ignore[method-assign]
        lambda name, what: name == "vllm" and what == "run" and next(runs) == 2
    )
    first, second = compare(SHORT, CATALOGUE["decode-1"], rounds=3)
    assert first.failures == {"vllm": "round 2: out of memory"}
    assert [("vllm" in sample, "npu-zoo" in sample) for sample in first.rounds] == [(True, True), *[(False, True)] * 2]
    assert len(first.ratios("vllm", "npu-zoo")) == 1
    assert second.failures == {}
    assert [name for name, _ in compare.of("load")].count("vllm") == 2
    assert compare.steps[-1].done == compare.steps[-1].total


def test_an_engine_that_cannot_load_is_tried_once(compare: Compare) -> None:
    compare.process.fails_on = staticmethod(lambda name, what: (name, what) == ("vllm", "load"))  # type: ignore[method-assign]
    results = compare(SHORT, CATALOGUE["decode-1"])
    assert [result.failures for result in results] == [{"vllm": "warm-up: out of memory"}] * 2
    assert [name for name, _ in compare.of("load")].count("vllm") == 1


def test_a_case_that_hits_a_prefix_cache_is_refused_unless_sharing_is_its_point(compare: Compare) -> None:
    compare.process.cached_tokens = 16
    new, shared = compare(SHORT, CATALOGUE["shared-prefix"], engines=("npu-zoo",))
    assert "took 16 tokens of new prompts from its prefix cache" in new.failures["npu-zoo"]
    assert shared.failures == {}


@pytest.mark.parametrize(
    ("waves", "told"),
    [({"preemptions": 3}, "3 preemptions"), ({"ended_at_all_started": 1}, "1 of 2 sequences had ended")],
    ids=["lost room", "two waves"],
)
def test_a_decode_batch_that_did_not_run_at_once_is_refused(waves: dict[str, int], told: str, compare: Compare) -> None:
    compare.process.waves = waves
    decode, total = compare(SHORT, CATALOGUE["mixed"], engines=("npu-zoo",))
    assert told in decode.failures["npu-zoo"]
    assert "did not run at once" in decode.failures["npu-zoo"]
    assert decode.rounds == [{}, {}]
    assert total.failures == {}
    assert total.preemptions_of("npu-zoo") == 2 * waves.get("preemptions", 0)
    assert len(compare.of("load")) == 1, "its process is as good as before"


def test_the_warm_up_makes_the_room_that_the_rounds_need(compare: Compare) -> None:
    compare(SHORT, engines=("npu-zoo",))
    assert compare.of("longest") == [("npu-zoo", 4 + 5)] * 3


def test_greedy_tokens_are_compared_with_the_first_engine_s(compare: Compare) -> None:
    compare.process.differing = "transformers"
    (result,) = compare(SHORT)
    assert result.agreement["vllm"].first_difference is None
    assert (result.agreement["transformers"].first_difference, result.agreement["transformers"].tokens) == (4, 5)
