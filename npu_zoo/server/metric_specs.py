"""What /metrics exposes, as data: names, types, labels, buckets, and whose names they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

MetricType = Literal["counter", "gauge", "histogram"]
Origin = Literal["vLLM", "MindIE", "npu-zoo"]

FinishedReason = Literal["stop", "length", "abort", "error"]
RejectReason = Literal[
    "invalid", "unauthorized", "too_large", "queue_full", "rate_limit", "concurrency_limit", "draining", "engine_down"
]
FailReason = Literal["engine_died", "engine_error", "form"]
AbortReason = Literal["disconnect", "shutdown", "engine"]

MODEL_NAME = "model_name"
"""The label of every metric but those of the process."""

TOKEN_BUCKETS: tuple[float, ...] = ()
"""Stands for 1, 2, 5, 10, … up to the longest sequence that the model takes."""

# Boundaries of vLLM's vllm/v1/metrics/buckets.py and, MINDIE_…, of MindIE-LLM's prometheus_metrics.cpp.
_SHORT_LATENCIES = (0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0)
LATENCY_BUCKETS = (*_SHORT_LATENCIES, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0)
MINDIE_TTFT_BUCKETS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
TTFT_BUCKETS = (*MINDIE_TTFT_BUCKETS, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0)
MINDIE_TPOT_BUCKETS = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
ITL_BUCKETS = (*MINDIE_TPOT_BUCKETS, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)
N_BUCKETS = (1.0, 2.0, 5.0, 10.0, 20.0)
MINDIE_E2E_BUCKETS = (1.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0)
MINDIE_TOKEN_BUCKETS = (10.0, 50.0, 100.0, 200.0, 500.0, 1e3, 2e3, 5e3, 1e4, 1.6e4, 2e4, 3.2e4, 5e4, 6.4e4, 1.28e5)

HTTP_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)


@dataclass(frozen=True)
class MetricSpec:
    """One metric.

    Attributes:
        name: as it is scraped; a counter's ends in ``_total``.
        meaning: one line for the exposition and the docs.
        origin: whose dashboards know the name.
        labels: beside ``model_name``.
        buckets: a histogram's upper bounds; :data:`TOKEN_BUCKETS` depends on the model.
    """

    name: str
    type: MetricType
    meaning: str
    origin: Origin
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = TOKEN_BUCKETS

    @property
    def sample_names(self) -> tuple[str, ...]:
        """The names of its series."""
        if self.type != "histogram":
            return (self.name,)
        return (f"{self.name}_bucket", f"{self.name}_count", f"{self.name}_sum")


def token_buckets(max_model_len: int) -> tuple[float, ...]:
    """1, 2, 5, 10, 20, 50, … up to a number of tokens (vLLM's boundaries)."""
    powers = (10**exponent for exponent in range(len(str(max_model_len))))
    return tuple(float(m * power) for power in powers for m in (1, 2, 5) if m * power <= max_model_len)


def _counter(name: str, meaning: str, origin: Origin, *labels: str) -> MetricSpec:
    return MetricSpec(name, "counter", meaning, origin, labels)


def _gauge(name: str, meaning: str, origin: Origin, *labels: str) -> MetricSpec:
    return MetricSpec(name, "gauge", meaning, origin, labels)


def _histogram(
    name: str, meaning: str, origin: Origin, buckets: tuple[float, ...] = TOKEN_BUCKETS, *labels: str
) -> MetricSpec:
    return MetricSpec(name, "histogram", meaning, origin, labels, buckets)


_ENGINE_COUNT = "over all engines that this server has had"
_GAP = "seconds between a completion's tokens; tokens that arrive together share the time since the last one"
_E2E = "seconds from a request's arrival to its last token, of requests that finished"
_TTFT = "seconds from a request's arrival to its first token"
_ACCEPTED = "requests that were accepted; those refused are in npu_zoo_requests_rejected_total"

VLLM_METRICS = (
    _gauge("vllm:num_requests_running", "sequences that the engine computes", "vLLM"),
    _gauge("vllm:num_requests_waiting", "sequences that wait for room in the engine", "vLLM"),
    _gauge("vllm:kv_cache_usage_perc", "share of the KV cache that sequences hold, 0 to 1", "vLLM"),
    _counter("vllm:prefix_cache_queries_total", f"prompt tokens of admitted sequences, {_ENGINE_COUNT}", "vLLM"),
    _counter("vllm:prefix_cache_hits_total", f"prompt tokens that the prefix cache had, {_ENGINE_COUNT}", "vLLM"),
    _counter("vllm:num_preemptions_total", f"sequences that lost their room, {_ENGINE_COUNT}", "vLLM"),
    _counter(
        "vllm:spec_decode_num_drafts_total", f"times that guesses of a sequence were verified, {_ENGINE_COUNT}", "vLLM"
    ),
    _counter(
        "vllm:spec_decode_num_draft_tokens_total", f"tokens that were guessed and verified, {_ENGINE_COUNT}", "vLLM"
    ),
    _counter("vllm:spec_decode_num_accepted_tokens_total", f"those that were right, {_ENGINE_COUNT}", "vLLM"),
    _counter("vllm:prompt_tokens_total", "prompt tokens of requests that got their first token", "vLLM"),
    _counter("vllm:prompt_tokens_cached_total", "those of them that came from the prefix cache", "vLLM"),
    _counter("vllm:generation_tokens_total", "tokens generated, of all completions", "vLLM"),
    _counter(
        "vllm:request_success_total",
        "requests that ended; where completions differ, abort, or else error, or else length",
        "vLLM",
        "finished_reason",
    ),
    _histogram("vllm:time_to_first_token_seconds", _TTFT, "vLLM", TTFT_BUCKETS),
    _histogram("vllm:inter_token_latency_seconds", _GAP, "vLLM", ITL_BUCKETS),
    _histogram(
        "vllm:request_time_per_output_token_seconds",
        "a finished request's mean seconds per token after the first, over its longest completion",
        "vLLM",
        ITL_BUCKETS,
    ),
    _histogram("vllm:e2e_request_latency_seconds", _E2E, "vLLM", LATENCY_BUCKETS),
    _histogram(
        "vllm:request_queue_time_seconds",
        "seconds in the engine's queue, where the engine tells",
        "vLLM",
        LATENCY_BUCKETS,
    ),
    _histogram(
        "vllm:request_prefill_time_seconds",
        "seconds from leaving the queue to the first token, where the engine tells",
        "vLLM",
        LATENCY_BUCKETS,
    ),
    _histogram("vllm:request_decode_time_seconds", "seconds from first to last token", "vLLM", LATENCY_BUCKETS),
    _histogram(
        "vllm:request_inference_time_seconds",
        "seconds from leaving the queue to the last token, where the engine tells",
        "vLLM",
        LATENCY_BUCKETS,
    ),
    _histogram("vllm:request_prompt_tokens", "prompt tokens of a request that got its first token", "vLLM"),
    _histogram("vllm:request_generation_tokens", "tokens of all completions of such a request", "vLLM"),
    _histogram("vllm:request_max_num_generation_tokens", "tokens of its longest completion", "vLLM"),
    _histogram("vllm:request_params_n", "completions asked for", "vLLM", N_BUCKETS),
    _histogram("vllm:request_params_max_tokens", "max_tokens, of requests that set it", "vLLM"),
)

MINDIE_METRICS = (
    _counter("request_received_total", _ACCEPTED, "MindIE"),
    _counter("request_success_total", "requests that finished by themselves or at a limit", "MindIE"),
    _counter("request_failed_total", "accepted requests that ended in an error", "MindIE"),
    _gauge("num_requests_running", "as vllm:num_requests_running", "MindIE"),
    _gauge("num_requests_waiting", "as vllm:num_requests_waiting", "MindIE"),
    _counter("num_preemptions_total", "as vllm:num_preemptions_total", "MindIE"),
    _counter("prompt_tokens_total", "as vllm:prompt_tokens_total", "MindIE"),
    _counter("generation_tokens_total", "as vllm:generation_tokens_total", "MindIE"),
    _gauge("npu_cache_usage_perc", "as vllm:kv_cache_usage_perc", "MindIE"),
    _gauge(
        "npu_prefix_cache_hit_rate",
        "vllm:prefix_cache_hits_total over vllm:prefix_cache_queries_total, 0 to 1",
        "MindIE",
    ),
    _histogram("time_to_first_token_seconds", _TTFT, "MindIE", MINDIE_TTFT_BUCKETS),
    _histogram("time_per_output_token_seconds", _GAP, "MindIE", MINDIE_TPOT_BUCKETS),
    _histogram("e2e_request_latency_seconds", _E2E, "MindIE", MINDIE_E2E_BUCKETS),
    _histogram("request_prompt_tokens", "as vllm:request_prompt_tokens", "MindIE", MINDIE_TOKEN_BUCKETS),
    _histogram("request_generation_tokens", "as vllm:request_generation_tokens", "MindIE", MINDIE_TOKEN_BUCKETS),
)

OWN_METRICS = (
    _gauge("npu_zoo_build_info", "1; the label is the version", "npu-zoo", "version"),
    _counter("npu_zoo_requests_received_total", "accepted requests: chat, completion, …", "npu-zoo", "kind"),
    _counter("npu_zoo_requests_rejected_total", "requests refused before the engine", "npu-zoo", "reason"),
    _counter("npu_zoo_requests_failed_total", "accepted requests that ended in an error", "npu-zoo", "reason"),
    _counter("npu_zoo_requests_aborted_total", "accepted requests called off", "npu-zoo", "reason"),
    _gauge("npu_zoo_requests_in_flight", "accepted requests that have not ended", "npu-zoo"),
    _gauge("npu_zoo_engine_up", "whether the engine's process is up and ready, 0 or 1", "npu-zoo"),
    _counter("npu_zoo_engine_restarts_total", "engine processes started after the first", "npu-zoo"),
    _counter(
        "npu_zoo_http_requests_total",
        "HTTP requests answered",
        "npu-zoo",
        "route",
        "method",
        "status",
    ),
    _histogram(
        "npu_zoo_http_request_duration_seconds",
        "seconds from an HTTP request's arrival to the end of its answer",
        "npu-zoo",
        HTTP_BUCKETS,
        "route",
    ),
)

METRICS = (*VLLM_METRICS, *MINDIE_METRICS, *OWN_METRICS)

ENGINE_NAMESPACE = "npu_zoo_engine"

LABEL_VALUES: dict[tuple[str, str], tuple[str, ...]] = {
    ("vllm:request_success_total", "finished_reason"): get_args(FinishedReason),
    ("npu_zoo_requests_rejected_total", "reason"): get_args(RejectReason),
    ("npu_zoo_requests_failed_total", "reason"): get_args(FailReason),
    ("npu_zoo_requests_aborted_total", "reason"): get_args(AbortReason),
}
"""By metric and label, all the values that there are; each is exposed from the start, as 0."""

PROCESSES = {"process": "the server's process", f"{ENGINE_NAMESPACE}_process": "the engine's process"}
"""What the names of the process facts begin with, and whose facts they are; they have no labels."""

PROCESS_FACTS: dict[str, tuple[MetricType, str]] = {
    "virtual_memory_bytes": ("gauge", "virtual memory"),
    "resident_memory_bytes": ("gauge", "resident memory"),
    "start_time_seconds": ("gauge", "when it started, in seconds since 1970"),
    "cpu_seconds_total": ("counter", "CPU time"),
    "max_fds": ("gauge", "limit of open files"),
    "open_fds": ("gauge", "open files"),
}
