"""docs/serving-observability.md and docs/serving-metrics.md say what the server's modules do."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import pytest
import yaml

from npu_zoo.core.engine import CompletionOutput, RequestMetrics, RequestOutput
from npu_zoo.server import logs, tracing
from npu_zoo.server.logs import JsonFormatter, RequestLine, RequestLog
from npu_zoo.server.metric_specs import METRICS
from npu_zoo.server.metrics import ServerMetrics

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGE = (DOCS / "serving-observability.md").read_text(encoding="utf-8")
TABLE = (DOCS / "serving-metrics.md").read_text(encoding="utf-8")


def test_the_scrape_configuration_reads_metrics() -> None:
    config = yaml.safe_load(re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)[0])
    (job,) = config["scrape_configs"]
    assert job["metrics_path"] == "/metrics"
    assert job["static_configs"][0]["targets"]


def test_every_name_of_the_page_is_a_metric() -> None:
    named = set(re.findall(r"`(\w+_total|npu_zoo_\w+)`", PAGE))
    assert named <= {spec.name for spec in METRICS}
    assert len(named) > 4


def test_the_table_has_every_series_that_is_exposed() -> None:
    documented = set(re.findall(r"^\| `([\w:]+)` \| (?:counter|gauge|histogram) \|", TABLE, re.MULTILINE))
    body, _ = ServerMetrics("m", 128).exposition()
    exposed = set(re.findall(r"^# TYPE (\S+)", body.decode(), re.MULTILINE))
    assert exposed <= documented
    assert {name for name in documented - exposed if not name.startswith("npu_zoo_engine_process_")} == set()


def test_the_fields_of_a_record(caplog: pytest.LogCaptureFixture) -> None:
    table = PAGE.split("| field | meaning |\n|---|---|\n")[1].split("\n\n")[0]
    documented = {name for line in table.splitlines() for name in re.findall(r"`(\w+)`", line.split("|")[1])}
    output = RequestOutput("r", "p", [1], [CompletionOutput(0, "t", [2])], True, RequestMetrics(0.0))
    with caplog.at_level(logging.INFO, logs.LOGGER):
        RequestLog(prompts=True).ended(RequestLine("r", "POST", "/v1/completions", 200, 0.1), [output])
    (record,) = [found for found in caplog.records if found.name == logs.LOGGER]
    assert set(json.loads(JsonFormatter().format(record))) == documented


def test_the_numbers_of_the_page() -> None:
    assert f"{logs.MAX_VALUE_LENGTH:,} characters" in PAGE
    assert (tracing.SHUTDOWN_TIMEOUT, "five seconds" in PAGE) == (5.0, True)
