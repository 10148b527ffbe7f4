"""Spans as an in-memory exporter and a stand-in for a collector see them."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ParentBased
from opentelemetry.semconv._incubating.attributes import error_attributes, gen_ai_attributes, http_attributes
from opentelemetry.trace import SpanKind, StatusCode

from npu_zoo.core.engine import CompletionOutput, RequestMetrics, RequestOutput
from npu_zoo.core.errors import HardwareError, UsageError
from npu_zoo.core.sampling import SamplingParams, StructuredOutputs
from npu_zoo.server import tracing
from npu_zoo.server.tracing import NO_TRACING, OpenTelemetryTracing, TracedRequest, start_tracing, traces_address

TRACE_ID, SPAN_ID = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
TRACEPARENT = {"traceparent": f"00-{TRACE_ID}-{SPAN_ID}-01", "authorization": "Bearer hidden"}
VARIABLES = (
    "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT",
    "OTEL_EXPORTER_OTLP_ENDPOINT",
    "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL",
    "OTEL_EXPORTER_OTLP_PROTOCOL",
    "OTEL_SDK_DISABLED",
    "OTEL_TRACES_EXPORTER",
    "OTEL_SERVICE_NAME",
    "OTEL_RESOURCE_ATTRIBUTES",
)


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def spans(exporter: InMemorySpanExporter) -> Iterator[OpenTelemetryTracing]:
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    made = OpenTelemetryTracing(provider)
    yield made
    made.shutdown()


def request(params: SamplingParams | None = None, **changes: Any) -> TracedRequest:
    fields: dict[str, Any] = {
        "operation": "chat",
        "request_id": "id-1",
        "answer_id": "chatcmpl-1",
        "model": "m",
        "route": "/v1/chat/completions",
        "params": params or SamplingParams(),
        "stream": True,
        "arrival_time": time.monotonic() - 10,
    }
    return TracedRequest(**{**fields, **changes})


def output(arrival: float, *, scheduled: float | None = None, reason: Any = "stop") -> RequestOutput:
    metrics = RequestMetrics(arrival, arrival + 3, arrival + 7, cached_tokens=2, scheduled_time=scheduled)
    return RequestOutput(
        "r",
        "secret prompt",
        [1, 2, 3],
        [CompletionOutput(0, "secret text", [4, 5], finish_reason=reason)],
        True,
        metrics,
    )


def seconds(span: ReadableSpan) -> float:
    assert span.start_time is not None
    assert span.end_time is not None
    return (span.end_time - span.start_time) / 1e9


def test_a_request_s_span_has_the_conventions_attributes(
    spans: OpenTelemetryTracing, exporter: InMemorySpanExporter
) -> None:
    params = SamplingParams(
        n=2, temperature=0.5, top_k=5, max_tokens=9, seed=3, presence_penalty=1.0, stop="secret stop"
    )
    asked = request(params)
    spans.started(asked, {}).ended(200, [output(asked.arrival_time)])
    span = exporter.get_finished_spans()[-1]
    assert (span.name, span.kind, span.status.status_code) == ("chat m", SpanKind.SERVER, StatusCode.UNSET)
    found = dict(span.attributes or {})
    assert found.pop("gen_ai.response.time_to_first_chunk") == pytest.approx(3)
    assert found == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "npu_zoo",
        "gen_ai.request.model": "m",
        "gen_ai.response.model": "m",
        "gen_ai.response.id": "chatcmpl-1",
        "gen_ai.request.id": "id-1",
        "gen_ai.request.stream": True,
        "gen_ai.output.type": "text",
        "gen_ai.request.choice.count": 2,
        "gen_ai.request.max_tokens": 9,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 1.0,
        "gen_ai.request.top_k": 5,
        "gen_ai.request.presence_penalty": 1.0,
        "gen_ai.request.seed": 3,
        "gen_ai.usage.input_tokens": 3,
        "gen_ai.usage.output_tokens": 2,
        "gen_ai.usage.cache_read.input_tokens": 2,
        "gen_ai.response.finish_reasons": ("stop",),
        "http.request.method": "POST",
        "http.route": "/v1/chat/completions",
        "http.response.status_code": 200,
    }


def test_the_attributes_are_those_of_the_conventions(
    spans: OpenTelemetryTracing, exporter: InMemorySpanExporter
) -> None:
    params = SamplingParams(n=2, top_k=5, seed=3, presence_penalty=1, frequency_penalty=1)
    asked = request(params)
    spans.started(asked, {}).ended(500, [output(asked.arrival_time)], "internal")
    modules = (gen_ai_attributes, http_attributes, error_attributes)
    known = {value for module in modules for value in vars(module).values() if isinstance(value, str)}
    used = set(exporter.get_finished_spans()[-1].attributes or {})
    assert used - known == {"gen_ai.request.id"}  # vLLM's


def test_json_is_asked_for(spans: OpenTelemetryTracing, exporter: InMemorySpanExporter) -> None:
    spans.started(request(SamplingParams(structured_outputs=StructuredOutputs(json="{}"))), {}).ended(200)
    assert (exporter.get_finished_spans()[-1].attributes or {})["gen_ai.output.type"] == "json"


@pytest.mark.parametrize(
    ("scheduled", "phases"),
    [(1.0, {"queue": 1.0, "prefill": 2.0, "decode": 4.0}), (None, {"prefill": 3.0, "decode": 4.0})],
)
def test_phases_are_child_spans(
    scheduled: float | None, phases: dict[str, float], spans: OpenTelemetryTracing, exporter: InMemorySpanExporter
) -> None:
    asked = request()
    before = time.time_ns()
    at = None if scheduled is None else asked.arrival_time + scheduled
    spans.started(asked, {}).ended(200, [output(asked.arrival_time, scheduled=at)])
    *children, root = exporter.get_finished_spans()
    assert {child.name: pytest.approx(seconds(child), abs=0.05) for child in children} == phases
    assert root.context is not None
    assert all(child.parent and child.parent.span_id == root.context.span_id for child in children)
    assert seconds(root) >= 9.9
    assert abs((root.start_time or 0) - (before - 10 * 10**9)) < 2 * 10**9


def test_each_prompt_has_its_phases(spans: OpenTelemetryTracing, exporter: InMemorySpanExporter) -> None:
    asked = request(operation="text_completion")
    spans.started(asked, {}).ended(200, [output(asked.arrival_time)] * 2)
    *children, root = exporter.get_finished_spans()
    assert root.name == "text_completion m"
    assert [(child.name, dict(child.attributes or {})) for child in children] == [
        (name, {"npu_zoo.prompt.index": index}) for index in (0, 1) for name in ("prefill", "decode")
    ]


def test_a_request_without_a_token_has_no_phases(spans: OpenTelemetryTracing, exporter: InMemorySpanExporter) -> None:
    spans.started(request(), {}).ended(
        499, [RequestOutput("r", None, [1], [], False, RequestMetrics(0.0))], "disconnect"
    )
    (root,) = exporter.get_finished_spans()
    assert (root.attributes or {})["error.type"] == "disconnect"
    assert root.status.status_code is StatusCode.UNSET


@pytest.mark.parametrize(
    ("status", "error", "code"), [(400, None, "400"), (429, "queue_full", "queue_full"), (503, None, "503")]
)
def test_errors(
    status: int, error: str | None, code: str, spans: OpenTelemetryTracing, exporter: InMemorySpanExporter
) -> None:
    spans.started(request(), {}).ended(status, error=error)
    (span,) = exporter.get_finished_spans()
    assert (span.attributes or {})["error.type"] == code
    assert span.status.status_code is (StatusCode.ERROR if status >= 500 else StatusCode.UNSET)


def test_a_span_ends_once(spans: OpenTelemetryTracing, exporter: InMemorySpanExporter) -> None:
    asked = request()
    span = spans.started(asked, {})
    span.ended(200, [output(asked.arrival_time)])
    span.ended(500, [output(asked.arrival_time)], "late")
    assert [found.name for found in exporter.get_finished_spans()] == ["prefill", "decode", "chat m"]


def test_the_client_s_trace_goes_on(spans: OpenTelemetryTracing, exporter: InMemorySpanExporter) -> None:
    asked = request()
    spans.started(asked, TRACEPARENT).ended(200, [output(asked.arrival_time)])
    found = exporter.get_finished_spans()
    assert {f"{span.context.trace_id:032x}" for span in found if span.context} == {TRACE_ID}
    assert found[-1].parent is not None
    assert f"{found[-1].parent.span_id:016x}" == SPAN_ID
    assert "hidden" not in "".join(span.to_json() for span in found)


@pytest.mark.parametrize("bad", ["", "x", "00-" + "0" * 32 + f"-{SPAN_ID}-01", "00-é-\n-01", "ff-" * 40])
def test_a_broken_traceparent_begins_a_trace(
    bad: str, spans: OpenTelemetryTracing, exporter: InMemorySpanExporter
) -> None:
    spans.started(request(), {"traceparent": bad}).ended(200)
    (span,) = exporter.get_finished_spans()
    assert span.parent is None


def test_what_the_client_does_not_sample_is_not_recorded(exporter: InMemorySpanExporter) -> None:
    provider = TracerProvider(sampler=ParentBased(ALWAYS_OFF), shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    asked = request()
    OpenTelemetryTracing(provider).started(asked, {}).ended(200, [output(asked.arrival_time)])
    assert exporter.get_finished_spans() == ()
    provider.shutdown()


def test_no_text_is_in_a_span(spans: OpenTelemetryTracing, exporter: InMemorySpanExporter) -> None:
    asked = request(SamplingParams(stop="secret stop"))
    spans.started(asked, {}).ended(200, [output(asked.arrival_time)])
    assert "secret" not in "".join(span.to_json() for span in exporter.get_finished_spans())


class Collector(ThreadingHTTPServer):
    """Takes spans as a collector does, and keeps them decoded."""

    def __init__(self) -> None:
        self.received: list[tuple[str, str, ExportTraceServiceRequest]] = []
        super().__init__(("127.0.0.1", 0), _Handler)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def spans(self) -> list[Any]:
        return [
            s for _, _, r in self.received for one in r.resource_spans for scope in one.scope_spans for s in scope.spans
        ]

    @property
    def resource(self) -> dict[str, str]:
        found = self.received[0][2].resource_spans[0].resource.attributes
        return {attribute.key: attribute.value.string_value for attribute in found}


class _Handler(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        decoded = ExportTraceServiceRequest.FromString(body)
        self.server.received.append((self.path, self.headers["content-type"], decoded))
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def collector() -> Iterator[Collector]:
    with Collector() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_spans_reach_a_collector_at_shutdown(collector: Collector) -> None:
    made = start_tracing(collector.address)
    asked = request(SamplingParams(seed=2**64 - 1, max_tokens=10**30))
    made.started(asked, TRACEPARENT).ended(200, [output(asked.arrival_time)])
    made.shutdown()
    ((path, kind, _),) = collector.received
    assert (path, kind) == ("/v1/traces", "application/x-protobuf")
    assert [span.name for span in collector.spans] == ["prefill", "decode", "chat m"]
    assert {span.trace_id.hex() for span in collector.spans} == {TRACE_ID}
    assert collector.spans[-1].parent_span_id.hex() == SPAN_ID
    attributes = {attribute.key: attribute.value for attribute in collector.spans[-1].attributes}
    assert attributes["gen_ai.usage.output_tokens"].int_value == 2
    assert "gen_ai.request.seed" not in attributes
    assert collector.resource["service.name"] == "npu-zoo"


def test_the_environment_asks_for_spans_and_names_the_service(
    collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.address)
    monkeypatch.setenv("OTEL_SERVICE_NAME", "mine")
    made = start_tracing()
    made.started(request(), {}).ended(200)
    made.shutdown()
    assert collector.received[0][0] == "/v1/traces"
    assert collector.resource["service.name"] == "mine"


def test_a_collector_that_is_away_costs_the_spans_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "SHUTDOWN_TIMEOUT", 0.1)
    for name, value in (("BSP_MAX_QUEUE_SIZE", 4), ("BSP_MAX_EXPORT_BATCH_SIZE", 4), ("EXPORTER_OTLP_TIMEOUT", 1)):
        monkeypatch.setenv(f"OTEL_{name}", str(value))
    with socket.socket() as silent:  # takes connections and answers none
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        made = start_tracing(f"http://127.0.0.1:{silent.getsockname()[1]}")
        for _ in range(50):
            made.started(request(), {}).ended(200)
        made.shutdown()
        (sending,) = [thread for thread in threading.enumerate() if thread.name == "npu-zoo-last-spans"]
    sending.join()


@pytest.mark.parametrize(("name", "value"), [("OTEL_SDK_DISABLED", "true"), ("OTEL_TRACES_EXPORTER", "none")])
def test_the_environment_switches_spans_off(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv(name, value)
    assert start_tracing() is NO_TRACING


def test_nobody_asks_for_spans() -> None:
    made = start_tracing()
    span = made.started(request(), TRACEPARENT)
    assert made is NO_TRACING
    assert made.started(request(), {}) is span
    span.ended(200)
    made.shutdown()


def test_what_is_not_needed_is_not_imported() -> None:
    modules = ", ".join(
        f"npu_zoo.server.{name}" for name in ("logs", "metrics", "metrics_page", "request_ids", "timing")
    )
    program = f"import sys, npu_zoo.server.tracing as t, {modules}; t.start_tracing(); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert [name for name in done.stdout.split() if name.startswith(("opentelemetry", "torch", "fastapi"))] == []


@pytest.mark.parametrize("module", ["opentelemetry.sdk.trace", "opentelemetry.exporter.otlp.proto.http.trace_exporter"])
def test_spans_without_the_extra_name_it(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(HardwareError, match=r"spans need opentelemetry.*pip install 'npu-zoo\[tracing\]'"):
        start_tracing("http://127.0.0.1:9")


@pytest.mark.parametrize(
    ("endpoint", "address"),
    [
        ("http://c:4318", "http://c:4318/v1/traces"),
        ("http://c:4318/", "http://c:4318/v1/traces"),
        ("https://c/otlp", "https://c/otlp/v1/traces"),
        ("http://c:4318/v1/traces", "http://c:4318/v1/traces"),
    ],
)
def test_addresses(endpoint: str, address: str) -> None:
    assert traces_address(endpoint) == address


@pytest.mark.parametrize("endpoint", ["", "localhost:4318", "grpc://c:4317", "http://", "http:///v1/traces"])
def test_no_addresses(endpoint: str) -> None:
    with pytest.raises(UsageError, match="no address such as http://localhost:4318"):
        start_tracing(endpoint)


def test_another_protocol_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
    with pytest.raises(UsageError, match="grpc is asked for"):
        start_tracing("http://127.0.0.1:4317")
