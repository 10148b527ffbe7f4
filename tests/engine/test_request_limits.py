"""Time limits and priorities of single requests, and what an engine tells of how it stands."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from npu_zoo import LLM, SamplingParams
from npu_zoo.core.engine import RequestOutput
from npu_zoo.core.errors import UsageError
from npu_zoo.engine.sequence import Request

LONG = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)


def drain(llm: LLM) -> dict[str, RequestOutput]:
    last: dict[str, RequestOutput] = {}
    while llm.engine.has_unfinished_requests():
        last.update({output.request_id: output for output in llm.engine.step()})
    return last


def test_a_request_ends_as_it_is_when_its_time_is_over(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now)
    llm.engine.add_request("limited", "def f(x):", LONG, max_time=10)
    llm.engine.add_request("free", "def f(x):", SamplingParams(temperature=0, max_tokens=12, ignore_eos=True))
    for _ in range(5):
        llm.engine.step()
    now += 10
    (ended, *_) = llm.engine.step()
    assert (ended.request_id, ended.finished) == ("limited", True)
    assert (ended.outputs[0].finish_reason, ended.outputs[0].stop_reason) == ("length", "max_time")
    assert len(ended.outputs[0].token_ids) == 5
    assert drain(llm)["free"].outputs[0].token_ids[:5] == ended.outputs[0].token_ids
    assert llm.engine.stats().kv_cache_usage == 0


def test_a_waiting_request_whose_time_is_over_ends_without_text(launch: Callable[..., LLM], checkpoint: Path) -> None:
    with launch(checkpoint, max_num_seqs=1) as llm:
        llm.engine.add_request("first", "def f(x):", SamplingParams(temperature=0, max_tokens=4, ignore_eos=True))
        llm.engine.add_request("waits", "def f(x):", LONG, max_time=1e-9)
        ended = drain(llm)
    assert (ended["waits"].outputs[0].text, ended["waits"].outputs[0].stop_reason) == ("", "max_time")
    assert ended["waits"].metrics.first_token_time is None
    assert ended["waits"].metrics.scheduled_time is None
    times = ended["first"].metrics
    assert times.scheduled_time is not None
    assert times.first_token_time is not None
    assert times.arrival_time <= times.scheduled_time <= times.first_token_time
    assert len(ended["first"].outputs[0].token_ids) == 4


def test_a_request_that_ended_in_time_is_reported_once(llm: LLM) -> None:
    llm.engine.add_request("quick", "def f(x):", SamplingParams(temperature=0, max_tokens=2), max_time=1e-3)
    llm.engine.add_request("other", "def f(x):", LONG)
    finished = [o.request_id for _ in range(250) for o in llm.engine.step() if o.finished]
    assert sorted(finished) == ["other", "quick"]


@pytest.mark.parametrize("max_time", [0, -1, float("nan")])
def test_a_time_limit_is_positive(llm: LLM, max_time: float) -> None:
    with pytest.raises(UsageError, match="max_time"):
        llm.engine.add_request("bad", "def f(x):", LONG, max_time=max_time)
    assert not llm.engine.has_unfinished_requests()


def test_requests_of_better_priority_go_first(launch: Callable[..., LLM], checkpoint: Path) -> None:
    params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
    with launch(checkpoint, max_num_seqs=1) as llm:
        for number, priority in enumerate([0, 5, -1, 0]):
            llm.engine.add_request(str(number), "def f(x):", params, priority=priority)
        finished: list[str] = []
        while llm.engine.has_unfinished_requests():
            finished += [o.request_id for o in llm.engine.step() if o.finished]
    assert finished == ["2", "0", "3", "1"]


def test_what_an_engine_tells_of_itself(launch: Callable[..., LLM], checkpoint: Path) -> None:
    prompt = list(range(10, 42))
    options: dict[str, Any] = {"max_num_seqs": 2, "block_size": 16}
    with launch(checkpoint, **options) as llm:
        params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
        assert llm.engine.stats().num_waiting == 0
        llm.engine.add_request("a", prompt, params)
        drain(llm)
        for number in range(3):
            llm.engine.add_request(str(number), prompt, params)
        llm.engine.step()
        stats = llm.engine.stats()
        assert (stats.num_running, stats.num_waiting, stats.num_preemptions) == (2, 1, 0)
        # The last token of a prompt is always computed, so one of its two full blocks can be shared.
        assert (stats.prefix_cache_queries, stats.prefix_cache_hits) == (3 * 32, 2 * 16)
        assert 0 < stats.kv_cache_usage < 1
        drain(llm)
        assert llm.engine.stats().kv_cache_usage == 0


def test_requests_that_ended_in_time_are_not_kept(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=1)
    for number in range(300):
        llm.engine.add_request(str(number), "def f(x):", params, max_time=1000)
        drain(llm)
    gc.collect()
    assert not [found for found in gc.get_objects() if type(found) is Request]


@pytest.mark.parametrize("length", [47, 48, 49, 50])
def test_cached_tokens_are_those_of_the_first_completion(
    launch: Callable[..., LLM], checkpoint: Path, length: int
) -> None:
    prompt = list(range(10, 10 + length))
    params = SamplingParams(seed=1, n=3, max_tokens=4, ignore_eos=True)
    with launch(checkpoint, block_size=16) as llm:
        cached = [llm.generate([prompt], params)[0].metrics.cached_tokens for _ in range(2)]
    assert cached == [0, (length - 1) // 16 * 16]
