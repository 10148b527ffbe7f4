"""What a comparison asks of all engines, how a run becomes a figure, and what that takes at least."""

from __future__ import annotations

import dataclasses

import pytest

from npu_zoo.core.errors import UsageError
from npu_zoo.evaluation.peers.cases import CATALOGUE, START_ROOM, Case, cases_of_lengths, named_cases, work_of
from npu_zoo.evaluation.peers.result import CaseResult
from npu_zoo.evaluation.peers.worker.driver import Request, static_batches
from npu_zoo.evaluation.peers.worker.timeline import Run, summarise
from npu_zoo.evaluation.peers.worker.transformers_driver import left_pad
from npu_zoo.evaluation.work import ModelWork
from npu_zoo.registry import get_registry
from npu_zoo.testing import tiny_config

LOADED = [case for case in CATALOGUE.values() if not case.fresh]
NUM_TOKENS = 100


def _first_blocks(requests: list[Request]) -> set[tuple[int, ...]]:
    return {tuple(request.prompt[:16]) for request in requests if isinstance(request.prompt, list)}


@pytest.mark.parametrize("case", CATALOGUE.values(), ids=CATALOGUE)
def test_requests_hold_what_the_case_says(case: Case) -> None:
    requests = case.requests(NUM_TOKENS, 0)
    assert len(requests) == case.count
    for request in requests:
        assert case.output[0] <= request.max_tokens <= case.output[1]
        if isinstance(request.prompt, list):
            assert case.prompt[0] <= len(request.prompt) - case.shared_prefix <= case.prompt[1]
            assert set(request.prompt) <= set(range(NUM_TOKENS))


@pytest.mark.parametrize("case", LOADED, ids=lambda case: case.name)
def test_all_engines_get_the_same_round(case: Case) -> None:
    assert case.requests(NUM_TOKENS, 2) == case.requests(NUM_TOKENS, 2)


@pytest.mark.parametrize("case", LOADED, ids=lambda case: case.name)
def test_no_round_finds_another_rounds_prefix_cached(case: Case) -> None:
    rounds = [_first_blocks(case.requests(NUM_TOKENS, number)) for number in (-1, 0, 1)]
    assert len(set.union(*rounds)) == sum(map(len, rounds))


@pytest.mark.parametrize("case", LOADED, ids=lambda case: case.name)
def test_rounds_are_the_same_work(case: Case) -> None:
    def lengths(number: int) -> list[tuple[int, int]]:
        return [(len(request.prompt), request.max_tokens) for request in case.requests(NUM_TOKENS, number)]

    assert lengths(0) == lengths(1)


def test_only_the_shared_prefix_is_shared() -> None:
    case = CATALOGUE["shared-prefix"]
    prompts = [request.prompt for request in case.requests(NUM_TOKENS, 0)]
    assert len({tuple(prompt[:1024]) for prompt in prompts}) == 1
    assert len({tuple(prompt[1024:]) for prompt in prompts}) == 32
    assert len(_first_blocks(CATALOGUE["mixed"].requests(NUM_TOKENS, 0))) == 64


@pytest.mark.parametrize("case", CATALOGUE.values(), ids=CATALOGUE)
def test_scaling_keeps_the_form(case: Case) -> None:
    small = case.scaled(16)
    assert small.count == case.count
    assert sum(small.prompt) + small.shared_prefix <= sum(case.prompt) + case.shared_prefix
    assert 1 <= small.output[0] <= small.output[1] <= case.output[1]
    # A decode case without a second token would divide by nothing.
    assert small.output[0] >= min(2, case.output[0])
    assert case.scaled(1) == case


def test_warm_up_is_one_batch_of_few_tokens() -> None:
    requests = CATALOGUE["mixed"].warm_up(NUM_TOKENS)
    assert len(requests) == 16
    assert max(request.max_tokens for request in requests) <= 4


EVENTS = [(10.5, "a", 1), (10.5, "b", 1), (11.0, "a", 2), (11.5, "a", 3), (11.5, "c", 1), (12.5, "c", 2)]


def _run() -> Run:
    return summarise(10.0, EVENTS, [[7, 7, 7], [7], [7, 7]])


def test_decoding_starts_when_the_last_request_has_its_first_token() -> None:
    run = _run()
    assert (run.first_token, run.all_started, run.end) == (10.5, 11.5, 12.5)
    assert run.tokens_at_all_started == 5
    assert run.output_lengths == [3, 1, 2]
    assert run.ended_at_all_started == 2


def test_figures_of_a_run() -> None:
    requests = [Request([1] * 20, 3), Request([1] * 10, 1), Request([1] * 15, 2)]
    figures = {case.metric: case.value(_run(), requests) for case in LOADED}
    assert figures == {"decode": 1.0, "prefill": 30.0, "total": 51 / 2.5}


def test_time_outside_the_model_s_steps_is_the_host_s() -> None:
    # Half of a step before the last first token at 11.5, a quarter of the second after it.
    run = summarise(10.0, EVENTS, [[7, 7, 7], [7], [7, 7]], spans=[(10.0, 10.5), (11.0, 11.25), (12.0, 12.25)])
    assert run.model_seconds == (0.75, 0.25)
    shares = {}
    for case in LOADED:
        result = CaseResult.of(case)
        result.runs.append({"npu-zoo": dataclasses.asdict(run), "vllm": dataclasses.asdict(_run())})
        shares[case.metric] = result.host_share("npu-zoo")
        assert result.host_share("vllm") is None
    assert shares == {"prefill": 0.5, "decode": 0.75, "total": 0.6}


@pytest.mark.parametrize(
    ("token_ids", "told"),
    [([[7, 7, 7], [7], [7]], "6 tokens"), ([[7, 7, 7], [7], [7, 7], [7]], "3 requests")],
    ids=["a token too many", "a request unseen"],
)
def test_a_run_whose_tokens_do_not_add_up_is_refused(token_ids: list[list[int]], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        summarise(10.0, EVENTS, token_ids)


def test_static_batches_sort_by_output_and_lose_nobody() -> None:
    requests = [Request([1], length) for length in (5, 1, 4, 2, 3)]
    assert static_batches(requests, 2) == [[1, 3], [4, 2], [0]]
    assert static_batches(requests, 0) == static_batches(requests, 5) == [[0, 1, 2, 3, 4]]


def test_left_padding() -> None:
    assert left_pad([[1, 2, 3], [4]], 9) == ([[1, 2, 3], [9, 9, 4]], [[1, 1, 1], [0, 0, 1]])


def test_the_longest_sequence_is_known_before_any_is_drawn() -> None:
    for case in LOADED:
        assert max(len(r.prompt) + r.max_tokens for r in case.requests(NUM_TOKENS, 0)) <= case.longest
    assert CATALOGUE["start"].longest == START_ROOM


def test_cases_by_name() -> None:
    assert [case.name for case in named_cases("mixed, decode-1,mixed")] == ["mixed", "decode-1"]
    with pytest.raises(UsageError, match="no case 'nosuch'; there are decode-1"):
        named_cases("decode-1,nosuch")


def test_cases_of_lengths_are_a_prefill_and_its_decoding() -> None:
    cases = cases_of_lengths([(128, 64, 1), (128, 64, 8), (128, 32, 8), (16, 1, 2)])
    assert [(case.metric, case.count, case.prompt[0], case.output[0]) for case in cases] == [
        ("prefill", 1, 128, 1),
        ("decode", 1, 128, 64),
        ("prefill", 8, 128, 1),
        ("decode", 8, 128, 64),
        ("decode", 8, 128, 32),
        ("prefill", 2, 16, 1),
    ]
    assert len({case.name for case in cases}) == len(cases)


@pytest.fixture(scope="module")
def model() -> ModelWork:
    spec = get_registry().families["deepseek_coder"]
    return ModelWork(tiny_config(next(v.config for v in spec.variants if v.config)), "float32")


def _case(metric: str, **fields: object) -> Case:
    return Case("x", "x", metric, **{"count": 2, "prompt": (3, 3), "output": (3, 3), **fields})  # type: ignore[arg-type]


def _work(case: Case, model: ModelWork) -> tuple[tuple[int, int], int]:
    work, tokens = work_of(case, model, case.requests(10, 0))
    return tuple(work), tokens


def test_decoding_is_as_few_steps_as_batching_allows(model: ModelWork) -> None:
    steps = model.step([(3, 1), (3, 1)], 2) + model.step([(4, 1), (4, 1)], 2)
    assert _work(_case("decode"), model) == (tuple(steps), 4)


def test_a_total_is_prefill_and_decoding_and_counts_all_tokens(model: ModelWork) -> None:
    prefill, decode = _work(_case("prefill"), model), _work(_case("decode"), model)
    assert prefill == (tuple(model.prefill([3, 3])), 6)
    expected = tuple(a + b for a, b in zip(prefill[0], decode[0], strict=True))
    assert _work(_case("total"), model) == (expected, 12)


def test_a_shared_prefix_is_computed_once_and_counted_for_everyone(model: ModelWork) -> None:
    shared, tokens = _work(_case("total", prompt=(1, 1), shared_prefix=2), model)
    alone, same = _work(_case("total"), model)
    assert tokens == same == 12
    once = model.step([(0, 2)], 0).operations
    assert alone[1] - shared[1] == once
