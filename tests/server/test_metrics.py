"""Metrics against the parser of prometheus_client and against counts made another way."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from npu_zoo.core.engine import CompletionOutput, EngineStats, RequestMetrics, RequestOutput
from npu_zoo.core.sampling import SamplingParams
from npu_zoo.server.metric_specs import LABEL_VALUES, METRICS, PROCESS_FACTS, PROCESSES, token_buckets
from npu_zoo.server.metrics import ObservedRequest, ServerMetrics

# As Prometheus 2 and 3 ask for it.
PROMETHEUS_2 = "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.3,*/*;q=0.1"
PROMETHEUS_3 = "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,text/plain;version=0.0.4;q=0.3"

Series = dict[tuple[str, frozenset[tuple[str, str]]], float]


@dataclass
class Clock:
    """A clock that stands unless it is moved."""

    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


def new_metrics(clock: Clock | None = None, max_model_len: int = 4096) -> ServerMetrics:
    return ServerMetrics("m", max_model_len, clock or Clock())


def scraped(metrics: ServerMetrics, accept: str = "") -> Series:
    """Every series of an exposition, without the model's label."""
    body, _ = metrics.exposition(accept)
    parse = parse_openmetrics if accept else parse_text
    return {
        (sample.name, frozenset((k, v) for k, v in sample.labels.items() if k != "model_name")): sample.value
        for family in parse(body.decode())
        for sample in family.samples
    }


def value(metrics: ServerMetrics, name: str, **labels: str) -> float | None:
    return scraped(metrics).get((name, frozenset(labels.items())))


def state(metrics: RequestMetrics, *tokens: int, reason: Any = None, prompt: int = 3) -> RequestOutput:
    """A request's cumulative state with so many tokens in each completion."""
    outputs = [CompletionOutput(i, token_ids=[7] * n, finish_reason=reason) for i, n in enumerate(tokens)]
    return RequestOutput("r", None, [1] * prompt, outputs, reason is not None, metrics)


def test_every_metric_is_exposed_under_its_name_type_and_labels() -> None:
    metrics = new_metrics()
    run_one_of_everything(metrics)
    body, content_type = metrics.exposition()
    families = {family.name: family for family in parse_text(body.decode())}
    assert content_type == "text/plain; version=0.0.4; charset=utf-8"
    for spec in METRICS:
        family = families[spec.name.removesuffix("_total")]
        assert family.type == spec.type, spec.name
        assert {sample.name for sample in family.samples} == set(spec.sample_names)
        labels = {"model_name", *spec.labels} | ({"le"} if spec.type == "histogram" else set())
        assert {label for sample in family.samples for label in sample.labels} == labels
    processes = {f"{prefix}_{fact}".removesuffix("_total") for prefix in PROCESSES for fact in PROCESS_FACTS}
    assert set(families) == {spec.name.removesuffix("_total") for spec in METRICS} | processes


def run_one_of_everything(metrics: ServerMetrics) -> None:
    metrics.engine_started(os.getpid())
    metrics.engine_restarted(os.getpid())
    finished = metrics.received("chat", 3, SamplingParams(), 990.0)
    finished.finished(state(RequestMetrics(990.0, 995.0, 999.0, scheduled_time=991.5), 2, reason="stop"))
    metrics.received("chat", 3, SamplingParams()).failed("engine_error")
    metrics.received("chat", 3, SamplingParams()).aborted("disconnect")
    metrics.rejected("queue_full")
    metrics.http("/v1/models", "GET", 200, 0.01)


def test_no_two_metrics_share_a_series() -> None:
    names = [name for spec in METRICS for name in spec.sample_names]
    assert len(set(names)) == len(names)


NAMES = {spec.name for spec in METRICS}
TWINS = {
    "npu_cache_usage_perc": "vllm:kv_cache_usage_perc",
    "time_per_output_token_seconds": "vllm:inter_token_latency_seconds",
    **{name: f"vllm:{name}" for name in NAMES if f"vllm:{name}" in NAMES and name != "request_success_total"},
}


@pytest.mark.parametrize("name", sorted(TWINS))
def test_a_name_of_mindie_s_says_what_vllm_s_name_for_it_says(name: str) -> None:
    metrics = new_metrics()
    run_one_of_everything(metrics)
    metrics.engine_stats(EngineStats(1, 2, 0.25, 10, 4, 3))
    suffix = "_sum" if f"{name}_sum" in {key for key, _ in scraped(metrics)} else ""
    found = value(metrics, name + suffix)
    assert found
    assert found == value(metrics, TWINS[name] + suffix)


@pytest.mark.parametrize("accept", [PROMETHEUS_2, PROMETHEUS_3, "application/openmetrics-text"])
def test_openmetrics_says_the_same_with_the_same_names(accept: str) -> None:
    metrics = new_metrics()
    run_one_of_everything(metrics)
    body, content_type = metrics.exposition(accept)
    assert content_type.startswith("application/openmetrics-text; version=1.0.0")
    assert body.endswith(b"# EOF\n")
    fixed = {key: found for key, found in scraped(metrics).items() if "process_" not in key[0]}
    assert {key: found for key, found in scraped(metrics, accept).items() if "process_" not in key[0]} == fixed


@pytest.mark.parametrize("accept", ["", "*/*", "text/plain", "text/html, application/json;q=0.9", "\x00;;,,="])
def test_the_text_format_is_for_everybody_else(accept: str) -> None:
    body, content_type = new_metrics().exposition(accept)
    assert content_type.startswith("text/plain")
    assert list(parse_text(body.decode()))


def test_a_model_s_name_cannot_break_the_exposition() -> None:
    name = 'a"b\\c\nd{e="1"} 2 ü'
    body, _ = ServerMetrics(name, 16).exposition()
    labels = {s.labels.get("model_name") for family in parse_text(body.decode()) for s in family.samples}
    assert labels == {name, None}


def test_what_can_happen_shows_before_it_did() -> None:
    found = scraped(new_metrics())
    for (name, label), values in LABEL_VALUES.items():
        assert [found[name, frozenset({(label, known)})] for known in values] == [0] * len(values)


def test_two_servers_count_apart() -> None:
    one, other = new_metrics(), new_metrics()
    one.rejected("draining")
    assert value(one, "npu_zoo_requests_rejected_total", reason="draining") == 1
    assert value(other, "npu_zoo_requests_rejected_total", reason="draining") == 0


@dataclass
class History:
    """A request as it went, for counts of its own."""

    prompt: int
    n: int
    arrival: float
    cached: int
    steps: list[tuple[float, list[int]]] = field(default_factory=list)
    end: str = "stop"

    @property
    def tokens(self) -> list[int]:
        return [sum(step[i] for _, step in self.steps) for i in range(self.n)]

    @property
    def began(self) -> bool:
        return any(self.tokens)


@st.composite
def histories(draw: st.DrawFn) -> History:
    n = draw(st.integers(1, 3))
    arrival = draw(st.integers(0, 50)) / 4
    times = sorted(draw(st.lists(st.integers(0, 400), max_size=8)))
    steps = [
        (arrival + at / 8, draw(st.lists(st.integers(0, 3), min_size=n, max_size=n))) for at in dict.fromkeys(times)
    ]
    end = draw(st.sampled_from(["stop", "length", "abort", "error", "failed", "disconnect", "running"]))
    return History(draw(st.integers(1, 40)), n, arrival, draw(st.integers(0, 5)), steps, end)


def play(metrics: ServerMetrics, clock: Clock, history: History) -> ObservedRequest:
    """A request in the server: states come one by one, the last of them with what ends it."""
    clock.now = history.arrival
    request = metrics.received("chat", history.prompt, SamplingParams(n=history.n))
    engine = RequestMetrics(history.arrival)
    counts = [0] * history.n
    for at, new in history.steps:
        clock.now = at
        counts = [a + b for a, b in zip(counts, new, strict=True)]
        if any(counts) and engine.first_token_time is None:
            engine.first_token_time, engine.cached_tokens = at, history.cached
        request.progressed(state(engine, *counts))
    engine.finished_time = clock.now
    if history.end == "failed":
        request.failed("engine_died")
    elif history.end == "disconnect":
        request.aborted("disconnect")
    elif history.end != "running":
        request.finished(state(engine, *counts, reason=history.end))
    return request


@given(st.lists(histories(), max_size=8))
def test_counts_of_random_requests(played: list[History]) -> None:
    clock = Clock()
    metrics = new_metrics(clock)
    requests = [play(metrics, clock, history) for history in played]
    for request, history in zip(requests, played, strict=True):
        if history.end != "running":  # whatever comes late changes nothing
            request.progressed(state(RequestMetrics(0.0, 1.0), *([90] * history.n)))
            request.failed("engine_error")
            request.aborted("shutdown")
    series = scraped(metrics)

    def found(name: str, **labels: str) -> float:
        return series.get((name, frozenset(labels.items())), 0.0)

    ends = Counter(history.end for history in played)
    began = [history for history in played if history.began]
    ended = [history for history in began if history.end != "running"]
    finished = [history for history in played if history.end in ("stop", "length")]
    assert found("request_received_total") == len(played) == found("npu_zoo_requests_received_total", kind="chat")
    assert found("request_success_total") == len(finished)
    assert found("request_failed_total") == ends["failed"] + ends["error"]
    assert found("npu_zoo_requests_failed_total", reason="form") == ends["error"]
    assert found("npu_zoo_requests_in_flight") == ends["running"]
    assert found("npu_zoo_requests_aborted_total", reason="disconnect") == ends["disconnect"]
    assert found("npu_zoo_requests_aborted_total", reason="engine") == ends["abort"]
    assert found("vllm:request_success_total", finished_reason="stop") == ends["stop"]
    assert found("vllm:request_success_total", finished_reason="length") == ends["length"]
    assert found("vllm:request_success_total", finished_reason="abort") == ends["abort"] + ends["disconnect"]
    assert found("vllm:request_success_total", finished_reason="error") == ends["failed"] + ends["error"]
    assert found("vllm:prompt_tokens_total") == sum(history.prompt for history in began)
    assert found("vllm:prompt_tokens_cached_total") == sum(history.cached for history in began)
    assert found("vllm:generation_tokens_total") == sum(sum(history.tokens) for history in played)
    assert found("vllm:request_generation_tokens_sum") == sum(sum(history.tokens) for history in ended)
    assert found("vllm:request_prompt_tokens_count") == len(ended)
    assert found("vllm:request_params_n_sum") == sum(history.n for history in played)
    assert found("vllm:time_to_first_token_seconds_sum") == pytest.approx(sum(map(first_token, began)))
    assert found("vllm:e2e_request_latency_seconds_sum") == pytest.approx(sum(map(latency, finished)))
    assert found("vllm:e2e_request_latency_seconds_count") == len(finished)
    assert found("vllm:inter_token_latency_seconds_count") == sum(max(t - 1, 0) for h in played for t in h.tokens)
    assert found("vllm:inter_token_latency_seconds_sum") == pytest.approx(sum(map(gaps, played)))


def first_token(history: History) -> float:
    return next(at for at, new in history.steps if any(new)) - history.arrival


def latency(history: History) -> float:
    return history.steps[-1][0] - history.arrival if history.steps else 0.0


def gaps(history: History) -> float:
    """Seconds between tokens: from the first state with tokens of a completion to its last one.

    Of tokens that a completion begins with, the first is as old as the state before, which had the request's first.
    """
    total = 0.0
    began = next((at for at, new in history.steps if any(new)), 0.0)
    for index in range(history.n):
        times = [at for at, new in history.steps if new[index]]
        if times:
            several = next(new[index] for _, new in history.steps if new[index]) > 1
            before = max([at for at, _ in history.steps if began <= at < times[0]], default=times[0])
            total += times[-1] - (before if several else times[0])
    return total


@given(st.lists(st.lists(st.tuples(*[st.integers(0, 20)] * 6), min_size=1, max_size=5), min_size=1, max_size=4))
def test_counts_of_engines_that_restart(engines: list[list[tuple[int, ...]]]) -> None:
    metrics = new_metrics()
    expected = [0] * 6
    for number, increments in enumerate(engines):
        (metrics.engine_restarted if number else metrics.engine_started)()
        counts = [0] * 6
        for increment in increments:
            counts = [a + b for a, b in zip(counts, increment, strict=True)]
            metrics.engine_stats(EngineStats(1, 2, 0.5, *counts))
        expected = [a + b for a, b in zip(expected, counts, strict=True)]
    queries, hits, preemptions, *speculation = expected
    found = {name: count for (name, labels), count in scraped(metrics).items() if not labels}
    assert found["vllm:prefix_cache_queries_total"] == queries
    assert found["vllm:prefix_cache_hits_total"] == hits
    assert found["vllm:num_preemptions_total"] == preemptions == found["num_preemptions_total"]
    names = [f"vllm:spec_decode_num_{what}_total" for what in ("drafts", "draft_tokens", "accepted_tokens")]
    assert [found[name] for name in names] == speculation
    assert found["npu_prefix_cache_hit_rate"] == pytest.approx(hits / queries if queries else hits)
    assert found["npu_zoo_engine_restarts_total"] == len(engines) - 1


def test_an_engine_that_restarted_unnoticed_is_seen_by_counts_that_fall() -> None:
    metrics = new_metrics()
    metrics.engine_stats(EngineStats(prefix_cache_queries=100, prefix_cache_hits=10, num_preemptions=1))
    metrics.engine_stats(EngineStats(prefix_cache_queries=30, prefix_cache_hits=20, num_preemptions=1))
    assert value(metrics, "vllm:prefix_cache_queries_total") == 130
    assert value(metrics, "vllm:prefix_cache_hits_total") == 30
    assert value(metrics, "vllm:num_preemptions_total") == 2


def test_an_engine_that_is_gone_runs_nothing() -> None:
    metrics = new_metrics()
    metrics.engine_started(os.getpid())
    metrics.engine_stats(EngineStats(num_running=3, num_waiting=4, kv_cache_usage=0.75))
    assert value(metrics, "vllm:num_requests_running") == 3
    assert (value(metrics, "npu_zoo_engine_process_resident_memory_bytes") or 0) > 0
    metrics.engine_stopped()
    for name in ("num_requests_running", "num_requests_waiting", "npu_cache_usage_perc", "npu_zoo_engine_up"):
        assert value(metrics, name) == 0
    assert value(metrics, "npu_zoo_engine_process_resident_memory_bytes") is None


def test_a_process_id_that_is_nobody_s_any_more_does_no_harm() -> None:
    metrics = new_metrics()
    metrics.engine_started(2**22 + 1)
    assert value(metrics, "npu_zoo_engine_process_resident_memory_bytes") is None
    assert value(metrics, "npu_zoo_engine_up") == 1


def test_times_of_a_finished_request() -> None:
    clock = Clock(20.0)
    metrics = new_metrics(clock)
    request = metrics.received("chat", 3, SamplingParams(max_tokens=50), arrival_time=10.0)
    request.finished(state(RequestMetrics(10.25, 12.0, 20.0, scheduled_time=11.0), 5, reason="length"))
    expected = {
        "time_to_first_token": 2.0,
        "request_queue_time": 1.0,
        "request_prefill_time": 1.0,
        "request_decode_time": 8.0,
        "request_inference_time": 9.0,
        "e2e_request_latency": 10.0,
        "request_time_per_output_token": 2.0,
        "inter_token_latency": 8.0,
    }
    assert {name: value(metrics, f"vllm:{name}_seconds_sum") for name in expected} == expected
    assert value(metrics, "vllm:inter_token_latency_seconds_count") == 4
    assert value(metrics, "vllm:request_params_max_tokens_sum") == 50


def test_an_engine_that_tells_nothing_of_its_queue_shows_no_queue() -> None:
    metrics = new_metrics()
    metrics.received("chat", 3, SamplingParams(), 1000.0).finished(state(RequestMetrics(1000.0, 1001.0, 1002.0), 2))
    assert value(metrics, "vllm:request_queue_time_seconds_count") is None
    assert value(metrics, "vllm:time_to_first_token_seconds_count") == 1


def test_a_clock_that_the_engine_s_is_ahead_of_makes_no_negative_time() -> None:
    metrics = new_metrics(Clock(5.0))
    request = metrics.received("chat", 3, SamplingParams())
    request.progressed(state(RequestMetrics(5.0, 9.0), 1))
    request.finished(state(RequestMetrics(5.0, 9.0, 8.0), 4, reason="stop"))
    assert value(metrics, "vllm:inter_token_latency_seconds_sum") == 0
    assert value(metrics, "vllm:request_decode_time_seconds_sum") == 0


def test_completions_that_differ_count_as_the_gravest() -> None:
    metrics = new_metrics()
    output = state(RequestMetrics(1000.0, 1000.0, 1000.0), 1, 1, reason="stop")
    output.outputs[1].finish_reason = "length"
    metrics.received("chat", 3, SamplingParams(n=2)).finished(output)
    assert value(metrics, "vllm:request_success_total", finished_reason="length") == 1


def test_http_labels_are_few_whatever_clients_send() -> None:
    metrics = new_metrics()
    for number in range(50):
        metrics.http(None, f"M{number}\n", 404, 0.001)
    metrics.http("/v1/completions", "POST", 200, 0.5)
    series = [key for key in scraped(metrics) if key[0] == "npu_zoo_http_requests_total"]
    assert len(series) == 2
    assert value(metrics, "npu_zoo_http_requests_total", route="other", method="other", status="404") == 50


@given(st.integers(1, 2_000_000))
def test_token_buckets(max_model_len: int) -> None:
    buckets = token_buckets(max_model_len)
    assert buckets[0] == 1
    assert list(buckets) == sorted(set(buckets))
    assert buckets[-1] <= max_model_len < 2.5 * buckets[-1]
    assert {round(b / 10 ** (len(str(int(b))) - 1)) for b in buckets} <= {1, 2, 5}


def test_buckets_count_what_is_within_their_bound() -> None:
    clock = Clock(0.0)
    metrics = new_metrics(clock)
    times = [0.005 * (number + 1) for number in range(200)]
    for seconds in times:
        metrics.received("chat", 1, SamplingParams(), 0.0).progressed(state(RequestMetrics(0.0, seconds), 1))
    series = scraped(metrics)
    counts = {
        float(dict(labels)["le"]): found
        for (name, labels), found in series.items()
        if name == "vllm:time_to_first_token_seconds_bucket"
    }
    assert counts == {bound: sum(seconds <= bound for seconds in times) for bound in counts}
    assert min(bound for bound, count in counts.items() if count >= len(times) / 2) == 0.5
