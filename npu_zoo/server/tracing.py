"""OpenTelemetry spans of requests, with the attributes of the GenAI semantic conventions; needs ``npu-zoo[tracing]``.

Nothing here imports OpenTelemetry unless spans are asked for.
"""

from __future__ import annotations

import os
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal
from urllib.parse import urlsplit

from npu_zoo import __version__
from npu_zoo.core.engine import RequestOutput
from npu_zoo.core.errors import HardwareError, UsageError
from npu_zoo.core.sampling import SamplingParams
from npu_zoo.server.timing import RequestTimes

if TYPE_CHECKING:
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span

Operation = Literal["chat", "text_completion"]
"""The names that the conventions have."""

Attribute = str | bool | int | float | Sequence[str]

PROVIDER_NAME = "npu_zoo"
TRACES_PATH = "/v1/traces"
SHUTDOWN_TIMEOUT = 5.0
"""Seconds that the last spans have to reach the collector."""

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_CONTEXT_HEADERS = ("traceparent", "tracestate")


@dataclass(frozen=True)
class TracedRequest:
    """What is known of a request when its span begins.

    Attributes:
        answer_id: the answer's, such as ``chatcmpl-…``.
        model: the name that was asked for and is served.
        route: the route's template.
        arrival_time: on the monotonic clock.
    """

    operation: Operation
    request_id: str
    answer_id: str
    model: str
    route: str
    params: SamplingParams
    stream: bool
    arrival_time: float


class RequestSpan(ABC):
    """A request's span; it ends once, and later calls do nothing."""

    @abstractmethod
    def ended(self, status: int, outputs: Sequence[RequestOutput] = (), error: str | None = None) -> None:
        """The request was answered or called off.

        Args:
            status: of HTTP; 499 where the client went away.
            outputs: the last states, one for each of the request's prompts.
            error: the type or code of the error that was answered.
        """


class RequestTracing(ABC):
    """Makes spans, or does not."""

    @abstractmethod
    def started(self, request: TracedRequest, headers: Mapping[str, str]) -> RequestSpan:
        """Begin a request's span.

        Args:
            headers: with names in lower case; a ``traceparent`` among them makes the span a child of the client's.
        """

    @abstractmethod
    def shutdown(self) -> None:
        """Send what is left, within :data:`SHUTDOWN_TIMEOUT`."""


def start_tracing(endpoint: str | None = None) -> RequestTracing:
    """Spans over OTLP/HTTP where they are asked for, and none otherwise.

    Args:
        endpoint: the collector's address, such as ``http://collector:4318``; unset takes OpenTelemetry's own variables.
            Its SDK reads the others of them: headers, sampler, service name, limits.

    Raises:
        UsageError: the endpoint is no http address, or another protocol than http/protobuf is asked for.
        HardwareError: OpenTelemetry is not installed.
    """
    if not _wanted(endpoint):
        return NO_TRACING
    protocol = next((os.environ[name] for name in _PROTOCOLS if os.environ.get(name)), "http/protobuf")
    if protocol != "http/protobuf":
        raise UsageError(f"spans go over http/protobuf, and {protocol} is asked for; unset {' and '.join(_PROTOCOLS)}")
    return OpenTelemetryTracing(_provider(None if endpoint is None else traces_address(endpoint)))


def traces_address(endpoint: str) -> str:
    """Where a collector takes spans.

    Raises:
        UsageError: it is no http address.
    """
    parts = urlsplit(endpoint)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UsageError(f"--otlp-endpoint '{endpoint}' is no address such as http://localhost:4318")
    bare = endpoint.rstrip("/")
    return bare if parts.path.rstrip("/").endswith(TRACES_PATH) else bare + TRACES_PATH


class _NoSpan(RequestSpan):
    def ended(self, status: int, outputs: Sequence[RequestOutput] = (), error: str | None = None) -> None:
        pass


class _NoTracing(RequestTracing):
    def started(self, request: TracedRequest, headers: Mapping[str, str]) -> RequestSpan:
        return _NO_SPAN

    def shutdown(self) -> None:
        pass


_NO_SPAN = _NoSpan()
NO_TRACING: RequestTracing = _NoTracing()


class OpenTelemetryTracing(RequestTracing):
    """Spans by OpenTelemetry's SDK.

    Args:
        provider: owned from now on; nothing global is set.
    """

    def __init__(self, provider: TracerProvider) -> None:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider = provider
        self._tracer = provider.get_tracer("npu_zoo.server", __version__)
        self._propagator = TraceContextTextMapPropagator()

    def started(self, request: TracedRequest, headers: Mapping[str, str]) -> RequestSpan:
        """See :meth:`RequestTracing.started`."""
        from opentelemetry.context import Context
        from opentelemetry.trace import SpanKind

        carrier = {name: headers[name] for name in _CONTEXT_HEADERS if name in headers}
        span = self._tracer.start_span(
            f"{request.operation} {request.model}",
            context=self._propagator.extract(carrier, Context()),
            kind=SpanKind.SERVER,
            attributes=_request_attributes(request),
            start_time=_wall_time(request.arrival_time),
        )
        return _OpenTelemetrySpan(self, span, request) if span.is_recording() else _NO_SPAN

    def phase(self, parent: Span, name: str, start: float | None, end: float | None, prompt: int | None) -> None:
        """A finished child span between two instants on the monotonic clock; none where one is missing."""
        from opentelemetry.context import Context
        from opentelemetry.trace import set_span_in_context

        if start is None or end is None:
            return
        attributes = None if prompt is None else {"npu_zoo.prompt.index": prompt}
        context = set_span_in_context(parent, Context())
        child = self._tracer.start_span(name, context, attributes=attributes, start_time=_wall_time(start))
        child.end(_wall_time(max(start, end)))

    def shutdown(self) -> None:
        """See :meth:`RequestTracing.shutdown`."""
        # The SDK goes on trying as long as its exporter's timeout allows, whatever time a flush is given.
        sending = threading.Thread(target=self._provider.shutdown, name="npu-zoo-last-spans", daemon=True)
        sending.start()
        sending.join(SHUTDOWN_TIMEOUT)


class _OpenTelemetrySpan(RequestSpan):
    def __init__(self, tracing: OpenTelemetryTracing, span: Span, request: TracedRequest) -> None:
        self._tracing = tracing
        self._span = span
        self._request = request

    def ended(self, status: int, outputs: Sequence[RequestOutput] = (), error: str | None = None) -> None:
        from opentelemetry.trace import StatusCode

        if not self._span.is_recording():
            return
        times = [RequestTimes.of(output.metrics, self._request.arrival_time) for output in outputs]
        self._span.set_attributes({"http.response.status_code": status, **_answer_attributes(outputs, times)})
        if status >= 400:
            self._span.set_attribute("error.type", error or str(status))
        if status >= 500:
            self._span.set_status(StatusCode.ERROR)
        for index, one in enumerate(times):
            self._add_phases(one, index if len(times) > 1 else None)
        self._span.end()

    def _add_phases(self, times: RequestTimes, prompt: int | None) -> None:
        began = times.arrival if times.scheduled is None else times.scheduled
        self._tracing.phase(self._span, "queue", times.arrival, times.scheduled, prompt)
        self._tracing.phase(self._span, "prefill", began, times.first_token, prompt)
        self._tracing.phase(self._span, "decode", times.first_token, times.finished, prompt)


def _wanted(endpoint: str | None) -> bool:
    if endpoint is not None:
        return True
    off = os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true" or os.environ.get("OTEL_TRACES_EXPORTER") == "none"
    return not off and any(os.environ.get(name) for name in _ENDPOINTS)


def _provider(endpoint: str | None) -> TracerProvider:
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ModuleNotFoundError as error:
        raise HardwareError(
            f"spans need {error.name}, which is not installed: pip install 'npu-zoo[tracing]'"
        ) from None
    provider = TracerProvider(resource=_resource(), shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
    return provider


def _resource() -> Resource:
    """What the spans are of: the environment's service name, or else ours."""
    from opentelemetry.sdk.resources import Resource

    found = Resource.create({"service.version": __version__})
    named = not str(found.attributes.get("service.name", "unknown_service")).startswith("unknown_service")
    return found if named else found.merge(Resource({"service.name": "npu-zoo"}))


def _wall_time(instant: float) -> int:
    """An instant on the monotonic clock in nanoseconds since 1970."""
    return time.time_ns() - time.monotonic_ns() + int(instant * 1e9)


def _request_attributes(request: TracedRequest) -> dict[str, Attribute]:
    """Of what was asked for; stop strings are left out, as prompts are."""
    params = request.params
    asked: dict[str, Attribute | None] = {
        "gen_ai.operation.name": request.operation,
        "gen_ai.provider.name": PROVIDER_NAME,
        "gen_ai.request.model": request.model,
        "gen_ai.response.model": request.model,
        "gen_ai.response.id": request.answer_id,
        "gen_ai.request.id": request.request_id,
        "gen_ai.request.stream": request.stream,
        "gen_ai.output.type": "json" if _asks_for_json(params) else "text",
        "gen_ai.request.choice.count": params.n if params.n != 1 else None,
        "gen_ai.request.max_tokens": params.max_tokens,
        "gen_ai.request.temperature": float(params.temperature),
        "gen_ai.request.top_p": float(params.top_p),
        "gen_ai.request.top_k": params.top_k if params.top_k > 0 else None,
        "gen_ai.request.frequency_penalty": float(params.frequency_penalty) or None,
        "gen_ai.request.presence_penalty": float(params.presence_penalty) or None,
        "gen_ai.request.seed": params.seed,
        "http.request.method": "POST",
        "http.route": request.route,
    }
    return {name: value for name, value in asked.items() if value is not None and _can_be_sent(value)}


def _can_be_sent(value: Attribute) -> bool:
    """OTLP has whole numbers of 64 bits, and one that is larger would lose the batch."""
    return not isinstance(value, int) or abs(value) < 2**63


def _asks_for_json(params: SamplingParams) -> bool:
    wanted = params.structured_outputs
    return wanted is not None and bool(wanted.json or wanted.json_object)


def _answer_attributes(outputs: Sequence[RequestOutput], times: Sequence[RequestTimes]) -> dict[str, Attribute]:
    """Of what came out, over all prompts."""
    if not outputs:
        return {}
    completions = [completion for output in outputs for completion in output.outputs]
    attributes: dict[str, Attribute] = {
        "gen_ai.usage.input_tokens": sum(len(output.prompt_token_ids) for output in outputs),
        "gen_ai.usage.output_tokens": sum(len(completion.token_ids) for completion in completions),
        "gen_ai.usage.cache_read.input_tokens": sum(output.metrics.cached_tokens for output in outputs),
        "gen_ai.response.finish_reasons": [completion.finish_reason or "none" for completion in completions],
    }
    first = [one.time_to_first_token for one in times if one.time_to_first_token is not None]
    return {**attributes, **({"gen_ai.response.time_to_first_chunk": min(first)} if first else {})}
