"""Prometheus metrics of the server, under the names that vLLM's and MindIE's dashboards know."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.registry import Collector

from npu_zoo import __version__
from npu_zoo.core.engine import EngineStats, RequestMetrics, RequestOutput
from npu_zoo.core.sampling import SamplingParams
from npu_zoo.server.metric_specs import (
    ENGINE_NAMESPACE,
    LABEL_VALUES,
    METRICS,
    MODEL_NAME,
    AbortReason,
    FailReason,
    MetricSpec,
    RejectReason,
    token_buckets,
)
from npu_zoo.server.timing import RequestTimes

_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_OTHER = "other"
_OPENMETRICS = "application/openmetrics-text; version=1.0.0; charset=utf-8"
_SEVERITY = ("abort", "error", "length", "stop")
_M = TypeVar("_M", Counter, Gauge, Histogram)


class ServerMetrics:
    """What a server counts and measures of one model.

    One asyncio loop calls it; :meth:`exposition` may be called from another thread. Nothing is global: two servers in
    one process count apart.

    Args:
        model_name: the label of every series.
        max_model_len: where the buckets of token counts end.
        clock: the monotonic clock in seconds, which request metrics are on too.
    """

    def __init__(self, model_name: str, max_model_len: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.model_name = model_name
        self.clock = clock
        self._registry = CollectorRegistry()
        self._metrics = {spec.name: _create(spec, self._registry, max_model_len) for spec in METRICS}
        self._engine_pid: int | None = None
        self._last_stats = EngineStats()
        self._prefix_cache_queries = self._prefix_cache_hits = 0
        self._observe_processes()
        self._bind()
        self.child(Gauge, "npu_zoo_build_info", __version__).set(1)

    def received(
        self, kind: str, prompt_tokens: int, params: SamplingParams, arrival_time: float | None = None
    ) -> ObservedRequest:
        """An accepted request; what becomes of it is told to the object returned.

        Args:
            kind: ``chat``, ``completion`` and the like; one of few.
            arrival_time: when the server had it, on the clock; now, unless given.
        """
        self.child(Counter, "npu_zoo_requests_received_total", kind).inc()
        self.child(Counter, "request_received_total").inc()
        self.child(Histogram, "vllm:request_params_n").observe(params.n)
        if params.max_tokens is not None:
            self.child(Histogram, "vllm:request_params_max_tokens").observe(params.max_tokens)
        self.in_flight.inc()
        return ObservedRequest(self, prompt_tokens, self.clock() if arrival_time is None else arrival_time)

    def rejected(self, reason: RejectReason) -> None:
        """A request that was refused and never reached the engine."""
        self.child(Counter, "npu_zoo_requests_rejected_total", reason).inc()

    def engine_stats(self, stats: EngineStats) -> None:
        """How the engine stands. Where counts fall, another engine counts from 0 and is added to the ones before."""
        last = self._last_stats
        if any(getattr(stats, name) < getattr(last, name) for name in _ENGINE_COUNTERS):
            last = EngineStats()
        for name, counters in self._engine_counters.items():
            _inc(counters, getattr(stats, name) - getattr(last, name))
        self._prefix_cache_queries += stats.prefix_cache_queries - last.prefix_cache_queries
        self._prefix_cache_hits += stats.prefix_cache_hits - last.prefix_cache_hits
        self._last_stats = stats
        self._set_gauges(stats)

    def engine_started(self, pid: int | None = None) -> None:
        """An engine is up and ready.

        Args:
            pid: its process, whose memory and CPU time are exposed too.
        """
        self._engine_pid = pid
        self._last_stats = EngineStats()
        self.child(Gauge, "npu_zoo_engine_up").set(1)

    def engine_stopped(self) -> None:
        """The engine's process is gone; nothing runs or waits in it."""
        self._engine_pid = None
        self._last_stats = EngineStats()
        self._set_gauges(EngineStats())
        self.child(Gauge, "npu_zoo_engine_up").set(0)

    def engine_restarted(self, pid: int | None = None) -> None:
        """Another engine took the place of one that ended; its counts begin again."""
        self.engine_stopped()
        self.child(Counter, "npu_zoo_engine_restarts_total").inc()
        self.engine_started(pid)

    def http(self, route: str | None, method: str, status: int, seconds: float) -> None:
        """An HTTP request was answered.

        Args:
            route: the route's template, never the path that was asked for; None where no route matched.
            seconds: from its arrival to the end of the answer.
        """
        shown, known = route or _OTHER, method if method in _METHODS else _OTHER
        self.child(Counter, "npu_zoo_http_requests_total", shown, known, str(status)).inc()
        self.child(Histogram, "npu_zoo_http_request_duration_seconds", shown).observe(seconds)

    def exposition(self, accept: str = "") -> tuple[bytes, str]:
        """The body of /metrics and its content type.

        Args:
            accept: the request's Accept header; OpenMetrics is given where it is named, the text format otherwise.
        """
        if _accepts_openmetrics(accept):
            # Its default escaping takes the colon out of the names of samples, though not of HELP and TYPE:
            # https://github.com/prometheus/client_python/issues/1177
            encode: Callable[..., bytes] = openmetrics.generate_latest
            return encode(_Exposed(self._registry), escaping=openmetrics.ALLOWUTF8), _OPENMETRICS
        return generate_latest(_Exposed(self._registry)), CONTENT_TYPE_PLAIN_0_0_4

    def child(self, kind: type[_M], name: str, *labels: str) -> _M:
        """One series of a metric."""
        metric = self._metrics[name]
        if not isinstance(metric, kind):
            raise TypeError(f"{name} is a {type(metric).__name__.lower()}")
        return metric.labels(self.model_name, *labels)

    def _bind(self) -> None:
        """Series whose labels are known show from the start, as 0; those of every step need no look-up."""
        for spec in METRICS:
            if not spec.labels and spec.name not in _ONLY_WHERE_TOLD:
                self._metrics[spec.name].labels(self.model_name)
        for (name, _), values in LABEL_VALUES.items():
            for value in values:
                self.child(Counter, name, value)
        self.in_flight = self.child(Gauge, "npu_zoo_requests_in_flight")
        self.generated = self._counters("vllm:generation_tokens_total", "generation_tokens_total")
        self.gaps = self._histograms("vllm:inter_token_latency_seconds", "time_per_output_token_seconds")
        self._engine_counters = {name: self._counters(*names) for name, names in _ENGINE_COUNTERS.items()}
        self._engine_gauges = {
            name: [self.child(Gauge, metric) for metric in names] for name, names in _ENGINE_GAUGES.items()
        }
        self._hit_rate = self.child(Gauge, "npu_prefix_cache_hit_rate")

    def _observe_processes(self) -> None:
        ProcessCollector(registry=self._registry)
        ProcessCollector(ENGINE_NAMESPACE, pid=lambda: self._engine_pid or "none", registry=self._registry)

    def _set_gauges(self, stats: EngineStats) -> None:
        for name, gauges in self._engine_gauges.items():
            for gauge in gauges:
                gauge.set(getattr(stats, name))
        self._hit_rate.set(self._prefix_cache_hits / max(self._prefix_cache_queries, 1))

    def _counters(self, *names: str) -> tuple[Counter, ...]:
        return tuple(self.child(Counter, name) for name in names)

    def _histograms(self, *names: str) -> tuple[Histogram, ...]:
        return tuple(self.child(Histogram, name) for name in names)

    def count(self, amount: float, *names: str) -> None:
        """Add to one quantity under all its names."""
        _inc(self._counters(*names), amount)

    def measure(self, value: float | None, *names: str) -> None:
        """Observe one quantity under all its names; None is not observed."""
        if value is not None:
            _observe(self._histograms(*names), value)


class ObservedRequest:
    """One accepted request on its way; costs nothing while it waits. Ending it twice counts once."""

    __slots__ = ("_arrival", "_began", "_completions", "_ended", "_metrics", "_prompt_tokens", "_since")

    def __init__(self, metrics: ServerMetrics, prompt_tokens: int, arrival: float) -> None:
        self._metrics = metrics
        self._prompt_tokens = prompt_tokens
        self._arrival = self._since = arrival
        self._completions: dict[int, tuple[int, float]] = {}  # by index: tokens, and when the last of them came
        self._began = self._ended = False

    def progressed(self, output: RequestOutput) -> None:
        """Its state has changed; outputs are cumulative, and states may be left out."""
        if self._ended:
            return
        if not self._began and output.metrics.first_token_time is not None:
            self._begin(output.metrics)
        now = self._metrics.clock()
        for completion in output.outputs:
            self._count(completion.index, len(completion.token_ids), now)
        self._since = now

    def finished(self, output: RequestOutput) -> None:
        """Its last state, whose completions all have ended."""
        if self._ended:
            return
        reason = _finish_reason(output)
        if reason == "abort":
            self.aborted("engine", output)
            return
        if reason == "error":
            self.failed("form", output)
            return
        self._end(output, reason)
        self._metrics.count(1, "request_success_total")
        self._measure(output)

    def failed(self, reason: FailReason, output: RequestOutput | None = None) -> None:
        """It ended in an error.

        Args:
            output: its last state, where there is one.
        """
        if not self._ended:
            self._end(output, "error")
            self._metrics.count(1, "request_failed_total")
            self._metrics.child(Counter, "npu_zoo_requests_failed_total", reason).inc()

    def aborted(self, reason: AbortReason, output: RequestOutput | None = None) -> None:
        """It was called off.

        Args:
            output: its last state, where there is one.
        """
        if not self._ended:
            self._end(output, "abort")
            self._metrics.child(Counter, "npu_zoo_requests_aborted_total", reason).inc()

    def _begin(self, metrics: RequestMetrics) -> None:
        self._began = True
        times = RequestTimes.of(metrics, self._arrival)
        self._since = self._since if times.first_token is None else times.first_token
        self._metrics.count(self._prompt_tokens, "vllm:prompt_tokens_total", "prompt_tokens_total")
        self._metrics.count(metrics.cached_tokens, "vllm:prompt_tokens_cached_total")
        self._metrics.measure(
            times.time_to_first_token, "vllm:time_to_first_token_seconds", "time_to_first_token_seconds"
        )
        self._metrics.measure(times.queue, "vllm:request_queue_time_seconds")
        self._metrics.measure(times.prefill, "vllm:request_prefill_time_seconds")

    def _count(self, index: int, tokens: int, now: float) -> None:
        known, since = self._completions.get(index, (0, self._since))
        if tokens <= known:
            return
        self._completions[index] = (tokens, now)
        _inc(self._metrics.generated, tokens - known)
        gaps = tokens - max(known, 1)  # the first token ends no gap
        for _ in range(gaps):
            _observe(self._metrics.gaps, max(now - since, 0.0) / gaps)

    @property
    def _tokens(self) -> list[int]:
        return [tokens for tokens, _ in self._completions.values()]

    def _end(self, output: RequestOutput | None, reason: str) -> None:
        if output is not None:
            self.progressed(output)
        self._ended = True
        self._metrics.in_flight.dec()
        self._metrics.child(Counter, "vllm:request_success_total", reason).inc()
        if self._began:
            self._metrics.measure(self._prompt_tokens, "vllm:request_prompt_tokens", "request_prompt_tokens")
            self._metrics.measure(sum(self._tokens), "vllm:request_generation_tokens", "request_generation_tokens")
            self._metrics.measure(max(self._tokens, default=0), "vllm:request_max_num_generation_tokens")

    def _measure(self, output: RequestOutput) -> None:
        times = RequestTimes.of(output.metrics, self._arrival)
        later = max(self._tokens, default=0) - 1
        self._metrics.measure(times.total, "vllm:e2e_request_latency_seconds", "e2e_request_latency_seconds")
        self._metrics.measure(times.decode, "vllm:request_decode_time_seconds")
        self._metrics.measure(times.inference, "vllm:request_inference_time_seconds")
        if times.decode is not None and later > 0:
            self._metrics.measure(times.decode / later, "vllm:request_time_per_output_token_seconds")


_ENGINE_COUNTERS = {
    "prefix_cache_queries": ("vllm:prefix_cache_queries_total",),
    "prefix_cache_hits": ("vllm:prefix_cache_hits_total",),
    "num_preemptions": ("vllm:num_preemptions_total", "num_preemptions_total"),
    "num_drafts": ("vllm:spec_decode_num_drafts_total",),
    "num_draft_tokens": ("vllm:spec_decode_num_draft_tokens_total",),
    "num_accepted_tokens": ("vllm:spec_decode_num_accepted_tokens_total",),
}
_ENGINE_GAUGES = {
    "num_running": ("vllm:num_requests_running", "num_requests_running"),
    "num_waiting": ("vllm:num_requests_waiting", "num_requests_waiting"),
    "kv_cache_usage": ("vllm:kv_cache_usage_perc", "npu_cache_usage_perc"),
}
_ONLY_WHERE_TOLD = {
    "vllm:request_queue_time_seconds",
    "vllm:request_prefill_time_seconds",
    "vllm:request_inference_time_seconds",
}


class _Exposed(Collector):
    """A registry without the ``_created`` series, which would double it and which no dashboard reads."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    def collect(self) -> Iterable[Metric]:
        for metric in self._registry.collect():
            metric.samples = [sample for sample in metric.samples if not sample.name.endswith("_created")]
            yield metric


def _create(spec: MetricSpec, registry: CollectorRegistry, max_model_len: int) -> Counter | Gauge | Histogram:
    labels = (MODEL_NAME, *spec.labels)
    if spec.type == "histogram":
        buckets = spec.buckets or token_buckets(max_model_len)
        return Histogram(spec.name, spec.meaning, labels, buckets=buckets, registry=registry)
    kind = Counter if spec.type == "counter" else Gauge
    return kind(spec.name, spec.meaning, labels, registry=registry)


def _accepts_openmetrics(accept: str) -> bool:
    return any(part.split(";")[0].strip() == "application/openmetrics-text" for part in accept.split(","))


def _finish_reason(output: RequestOutput) -> str:
    found = {completion.finish_reason for completion in output.outputs}
    return next((reason for reason in _SEVERITY if reason in found), _SEVERITY[-1])


def _inc(counters: Iterable[Counter], amount: float) -> None:
    for counter in counters:
        counter.inc(amount)


def _observe(histograms: Iterable[Histogram], value: float) -> None:
    for histogram in histograms:
        histogram.observe(value)
