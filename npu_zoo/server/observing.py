"""What every HTTP request is observed by: an id, a log line, and its place in the metrics."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from npu_zoo.protocol.errors import ApiError
from npu_zoo.server.logs import LOGGER, RequestLine, RequestLog, log
from npu_zoo.server.metric_specs import RejectReason
from npu_zoo.server.request_ids import REQUEST_ID_HEADER, request_id

if TYPE_CHECKING:
    from npu_zoo.server.exchange import Exchange
    from npu_zoo.server.service import Service
    from npu_zoo.server.tracing import RequestSpan

_KEY = "npu_zoo"
_REASONS: dict[str | None, RejectReason] = {
    "invalid_api_key": "unauthorized",
    "queue_full": "queue_full",
    "rate_limit_exceeded": "rate_limit",
    "concurrency_limit_exceeded": "concurrency_limit",
    "draining": "draining",
    "engine_not_ready": "engine_down",
}
"""Why a request was turned away, by its error's code; of the others the status tells."""

_FAILURE = 500
_TOO_LARGE = 413


@dataclass
class Seen:
    """What is known of an HTTP request.

    Attributes:
        arrival_time: on the monotonic clock.
        exchange: its part in the engine, where it got so far.
        error: what the client was told instead of an answer.
        span: its trace, where it got so far.
    """

    id: str
    arrival_time: float = field(default_factory=time.monotonic)
    exchange: Exchange | None = None
    error: ApiError | None = None
    span: RequestSpan | None = None

    def fail(self, error: BaseException, found: ApiError) -> None:
        """Note an error; one that is not the request's is logged with its traceback."""
        self.error = found
        if found.status == _FAILURE:
            log(
                logging.getLogger(LOGGER), logging.ERROR, "failure", found.message, {"request_id": self.id}, error=error
            )


def seen(request: Request) -> Seen:
    """What is known of a request."""
    known: Seen = request.scope[_KEY]
    return known


class ObservingMiddleware:
    """Gives every request an id, and notes how it ended."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._service = service
        self._log = RequestLog(prompts=service.options.log_prompts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve as an ASGI application."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        known = scope[_KEY] = Seen(request_id(Headers(scope=scope).get(REQUEST_ID_HEADER)))
        status = _FAILURE

        async def send_on(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)[REQUEST_ID_HEADER] = known.id
            await send(message)

        try:
            await self._app(scope, receive, send_on)
        finally:
            self._note(scope, known, status)

    def _note(self, scope: Scope, known: Seen, status: int) -> None:
        seconds = time.monotonic() - known.arrival_time
        route = getattr(scope.get("route"), "path", None)
        self._service.metrics.http(route, scope["method"], status, seconds)
        exchange = known.exchange
        outputs = list(exchange.outputs.values()) if exchange else []
        error = (known.error.code or known.error.type) if known.error else None
        if exchange is None and scope["method"] == "POST" and (reason := _reason(known.error)):
            self._service.metrics.rejected(reason)
        if known.span is not None:
            known.span.ended(status, outputs, error)
        line = RequestLine(
            known.id,
            scope["method"],
            route,
            status,
            seconds,
            client=scope["client"][0] if scope.get("client") else None,
            model=self._service.model_names[0] if exchange else None,
            stream=exchange.stream if exchange else None,
            error=error,
            answer_id=exchange.answer_id if exchange else None,
            arrival_time=known.arrival_time,
        )
        self._log.ended(line, outputs)


def _reason(error: ApiError | None) -> RejectReason | None:
    """Why a request was turned away; None where it was not, or where the server failed on it."""
    if error is None or error.status == _FAILURE:
        return None
    return _REASONS.get(error.code, "too_large" if error.status == _TOO_LARGE else "invalid")
