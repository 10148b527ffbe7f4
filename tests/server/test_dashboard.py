"""The Grafana dashboard asks for nothing that the server does not expose."""

from __future__ import annotations

import json
import re
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from npu_zoo.server.metric_specs import METRICS, MODEL_NAME, PROCESS_FACTS, PROCESSES

FILE = Path(__file__).resolve().parents[2] / "docs" / "grafana" / "npu-zoo.json"
BOARD: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
PANELS: list[dict[str, Any]] = [panel for panel in BOARD["panels"] if panel["type"] != "row"]

ADDED_BY_PROMETHEUS = {"job", "instance"}
SERIES = {
    name: {MODEL_NAME, *spec.labels} | ({"le"} if name.endswith("_bucket") else set()) | ADDED_BY_PROMETHEUS
    for spec in METRICS
    for name in spec.sample_names
} | {f"{process}_{fact}": ADDED_BY_PROMETHEUS for process in PROCESSES for fact in PROCESS_FACTS}
HISTOGRAM_BUCKETS = {name for name in SERIES if name.endswith("_bucket")}
COUNTERS = {name for name in SERIES if name.endswith(("_total", "_bucket", "_sum", "_count"))}

FUNCTIONS = {"avg", "changes", "histogram_quantile", "increase", "max", "min", "rate", "sum"}
TOKEN = re.compile(
    r"""(?P<string>"(?:[^"\\]|\\.)*") | (?P<range>\[[^\]]*\]) | (?P<name>[A-Za-z_:][\w:]*) | (?P<number>[\d.]+)
      | (?P<operator>=~|!~|!=|[-+*/(){},=<>]) | (?P<space>\s+)""",
    re.VERBOSE,
)


def tokens(expression: str) -> list[tuple[str, str]]:
    found, end = [], 0
    while end < len(expression):
        match = TOKEN.match(expression, end)
        assert match, f"{expression[end:]!r} in {expression}"
        end = match.end()
        if match.lastgroup != "space":
            found.append((str(match.lastgroup), match.group()))
    return found


def parts(expression: str) -> tuple[set[str], set[str], set[str]]:
    """The functions, the series, and the labels that a PromQL expression names."""
    functions, series, labels = set(), set(), set()
    listed = tokens(expression)
    braces = grouping = False
    for (kind, text), (_, following) in zip(listed, [*listed[1:], ("", "")], strict=True):
        braces = (braces or text == "{") and text != "}"
        if kind == "name" and text in ("by", "without"):
            grouping = True
        elif grouping:
            grouping = text != ")"
            labels |= {text} if kind == "name" else set()
        elif kind == "name" and braces:
            labels.add(text)
        elif kind == "name" and (following == "(" or text in FUNCTIONS):
            functions.add(text)
        elif kind == "name":
            series.add(text)
    return functions, series, labels


EXPRESSIONS = [
    *[(panel["title"], target["expr"]) for panel in PANELS for target in panel["targets"]],
    *[(found["name"], found["expr"]) for found in BOARD["annotations"]["list"]],
]


def test_the_reader_of_expressions() -> None:
    read = parts('histogram_quantile(0.9, sum by (le, a) (rate(x:y_bucket{b=~"$c",d!="e)"}[5m]))) / sum(z) > 0')
    assert read == ({"histogram_quantile", "sum", "rate"}, {"x:y_bucket", "z"}, {"le", "a", "b", "d"})


@pytest.mark.parametrize(("title", "expression"), EXPRESSIONS)
def test_an_expression_names_what_is_exposed(title: str, expression: str) -> None:
    functions, series, labels = parts(expression)
    assert functions <= FUNCTIONS
    assert series
    assert series <= set(SERIES)
    assert all(labels <= SERIES[name] for name in series), labels
    assert expression.count("(") == expression.count(")")


@pytest.mark.parametrize(("title", "expression"), EXPRESSIONS)
def test_counters_are_rates_and_gauges_are_not(title: str, expression: str) -> None:
    for name in parts(expression)[1]:
        inside = re.findall(rf"(rate|increase|changes)\({re.escape(name)}{{[^}}]*}}\[", expression)
        assert bool(inside) is (name in COUNTERS), name
        assert ("histogram_quantile" in expression) is (name in HISTOGRAM_BUCKETS)
        assert ("le" in parts(expression)[2]) is (name in HISTOGRAM_BUCKETS)


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_a_panel_is_whole(panel: dict[str, Any]) -> None:
    assert panel["description"].endswith(".")
    assert panel["fieldConfig"]["defaults"]["unit"]
    assert [target["refId"] for target in panel["targets"]] == list("ABCDEF"[: len(panel["targets"])])
    assert {target["datasource"]["uid"] for target in panel["targets"]} == {"${datasource}"}
    for target in panel["targets"]:
        shown = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
        _, series, labels = parts(target["expr"])
        kept = labels if " by " in target["expr"] else set.intersection(*(SERIES[name] for name in series))
        assert shown <= kept


def test_variables_are_declared_and_read_what_is_exposed() -> None:
    declared = {variable["name"]: variable for variable in BOARD["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(BOARD)))
    assert used - {"__rate_interval", "__interval", "__all"} == set(declared)
    for variable in declared.values():
        if variable["type"] == "query":
            metric, label = re.findall(r"label_values\((\w+)(?:{.*})?, (\w+)\)", variable["query"]["query"])[0]
            assert label in SERIES[metric]


def test_ids_and_places_are_each_panel_s_own() -> None:
    ids = [panel["id"] for panel in BOARD["panels"]]
    assert len(set(ids)) == len(ids)
    for one, other in combinations([panel["gridPos"] for panel in BOARD["panels"]], 2):
        apart = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        assert apart or one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
    assert all(panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24 for panel in BOARD["panels"])


def test_what_operators_look_for_is_there() -> None:
    shown = {series for _, expression in EXPRESSIONS for series in parts(expression)[1]}
    assert shown >= {
        "vllm:request_success_total",
        "vllm:num_requests_running",
        "vllm:num_requests_waiting",
        "vllm:time_to_first_token_seconds_bucket",
        "vllm:inter_token_latency_seconds_bucket",
        "vllm:request_time_per_output_token_seconds_bucket",
        "vllm:e2e_request_latency_seconds_bucket",
        "vllm:generation_tokens_total",
        "vllm:kv_cache_usage_perc",
        "vllm:prefix_cache_hits_total",
        "vllm:num_preemptions_total",
        "npu_zoo_engine_restarts_total",
        "npu_zoo_http_requests_total",
        "npu_zoo_requests_rejected_total",
    }
    for name in ("time_to_first_token", "inter_token_latency", "request_time_per_output_token", "e2e_request_latency"):
        quantiles = [
            re.findall(r"histogram_quantile\(([\d.]+)", expression)
            for _, expression in EXPRESSIONS
            if f"vllm:{name}_seconds_bucket" in expression
        ]
        assert {found[0] for found in quantiles} == {"0.5", "0.9", "0.99"}
