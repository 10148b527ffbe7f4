"""The page of docs that lists all metrics, made from their specs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from npu_zoo.server.metric_specs import (
    LABEL_VALUES,
    METRICS,
    MODEL_NAME,
    PROCESS_FACTS,
    PROCESSES,
    TOKEN_BUCKETS,
    MetricSpec,
    Origin,
)

SOURCES: dict[Origin, str] = {
    "vLLM": "https://docs.vllm.ai/en/stable/usage/metrics/",
    "MindIE": "https://www.hiascend.com/document/detail/zh/mindie/21RC1/mindieservice/servicedev/mindie_service0103.html",
    "npu-zoo": "serving-observability.md",
}
"""Where each origin's names stand."""

INTRODUCTION = """\
# Metrics of the server

What `GET /metrics` exposes; [serving-observability.md](serving-observability.md) says how to read it. Where a quantity
means the same, it stands under the names of vLLM's and of MindIE's dashboards, so that both work as they are.

- Every series but those of processes has the label `model_name`; there is no label `engine` as vLLM has it.
- Counts and times are of requests where vLLM has those of sequences: a request with `n` completions counts once.
  `num_requests_running` and `num_requests_waiting` are of sequences, as in vLLM.
- Requests that were aborted or failed are in the counts and histograms of tokens; of their latencies only the time to
  the first token and between tokens is.
- A request of one token has no time per output token.
- Times begin when the server had the request.

"""


def metrics_page() -> str:
    """The introduction and a table for each origin."""
    sections = [_section(origin, [spec for spec in METRICS if spec.origin == origin]) for origin in SOURCES]
    links = [f"[{origin}]: {source}" for origin, source in SOURCES.items()]
    return INTRODUCTION + "\n".join([*sections, _processes(), *links, ""])


def _section(origin: Origin, specs: Iterable[MetricSpec]) -> str:
    lines = [f"## Names of {origin}", "", "| name | type | labels | whose name | meaning |", "|---|---|---|---|---|"]
    return "\n".join([*lines, *map(_row, specs), ""])


def _row(spec: MetricSpec) -> str:
    labels = ", ".join(f"`{label}`" for label in (MODEL_NAME, *spec.labels))
    return (
        f"| `{spec.name}` | {spec.type} | {labels} | [{spec.origin}] | {spec.meaning}{_values(spec)}{_buckets(spec)} |"
    )


def _values(spec: MetricSpec) -> str:
    known = [LABEL_VALUES[spec.name, label] for label in spec.labels if (spec.name, label) in LABEL_VALUES]
    return "".join(f": {', '.join(f'`{value}`' for value in values)}" for values in known)


def _buckets(spec: MetricSpec) -> str:
    if spec.type != "histogram":
        return ""
    if spec.buckets == TOKEN_BUCKETS:
        return "; buckets 1, 2, 5, 10, … up to `max_model_len`"
    return f"; {len(spec.buckets)} buckets, {spec.buckets[0]:g} to {spec.buckets[-1]:g}"


def _processes() -> str:
    return "\n".join(["## Processes", "", "| name | type | meaning |", "|---|---|---|", *_process_rows(), ""])


def _process_rows() -> Iterator[str]:
    for prefix, whose in PROCESSES.items():
        for fact, (kind, meaning) in PROCESS_FACTS.items():
            yield f"| `{prefix}_{fact}` | {kind} | {meaning}, of {whose} |"
