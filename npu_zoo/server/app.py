"""The server's routes."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from npu_zoo import __version__
from npu_zoo.protocol.answering import Answering
from npu_zoo.protocol.bodies import parse_request
from npu_zoo.protocol.errors import ApiError
from npu_zoo.protocol.requests import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    SimpleChatRequest,
    TokenizeRequest,
)
from npu_zoo.server.answers import EventStream, Generation, chained, encode_json, events, unless_gone
from npu_zoo.server.bodies import ClientGone, read_body
from npu_zoo.server.exchange import Exchange
from npu_zoo.server.hosts import HostMiddleware
from npu_zoo.server.observing import ObservingMiddleware, seen
from npu_zoo.server.openapi import body_of, describe
from npu_zoo.server.request_ids import REQUEST_ID_HEADER
from npu_zoo.server.service import Service, told
from npu_zoo.server.tracing import TracedRequest

BodyT = TypeVar("BodyT", bound=BaseModel)
SIMPLE_CHAT = "/chat"
_CLIENT_GONE = 499  # nginx's status for it; nobody reads it


def create_app(service: Service) -> FastAPI:
    """The application of a service: its routes, and errors in OpenAI's format wherever they come from."""
    app = FastAPI(title="npu-zoo", version=__version__, docs_url=None, redoc_url=None, redirect_slashes=False)
    routes = Routes(service)
    for path, endpoint in routes.readings().items():
        app.add_api_route(path, endpoint, methods=["GET"], response_model=None)
        app.add_api_route(path, endpoint, methods=["HEAD"], include_in_schema=False)
    for path, (endpoint, model) in routes.generations().items():
        app.add_api_route(path, endpoint, methods=["POST"], response_model=None, openapi_extra=body_of(model))
    app.add_exception_handler(HTTPException, answer_error)  # Starlette has an answer of its own for these
    app.openapi = partial(describe, app, keys=bool(service.keys))  # type: ignore[method-assign]
    _add_middleware(app, service)
    return app


def _add_middleware(app: FastAPI, service: Service) -> None:
    """What requests pass on their way to the routes, the last one first."""
    options = service.options
    if options.hosts:
        app.add_middleware(HostMiddleware, allowed=options.hosts)
    app.add_middleware(ErrorMiddleware)
    if options.cors_origin:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=options.cors_origin,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=[REQUEST_ID_HEADER, "Retry-After"],
        )
    app.add_middleware(ObservingMiddleware, service=service)


class Routes:
    """What each path does."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def readings(self) -> Mapping[str, Callable[..., Awaitable[Response]]]:
        """The paths that are read."""
        return {
            "/health": self.ready,
            "/health/live": self.live,
            "/health/ready": self.ready,
            "/version": self.version,
            "/metrics": self.metrics,
            "/v1/models": self.models,
            "/v1/models/{model:path}": self.model,
        }

    def generations(self) -> Mapping[str, tuple[Callable[..., Awaitable[Response]], type[Any]]]:
        """The paths that bodies are sent to, and the bodies' forms."""
        return {
            "/v1/chat/completions": (self.chat_completions, ChatCompletionRequest),
            "/v1/completions": (self.completions, CompletionRequest),
            SIMPLE_CHAT: (self.chat, SimpleChatRequest),
            "/tokenize": (self.tokenize, TokenizeRequest),
            "/detokenize": (self.detokenize, DetokenizeRequest),
        }

    async def live(self) -> Response:
        """Whether the server answers."""
        return answer_json({"status": "ok"})

    async def ready(self) -> Response:
        """Whether the server takes requests."""
        return answer_json({"status": self._service.status}, status=200 if self._service.ready else 503)

    async def version(self) -> Response:
        """The server's version."""
        return answer_json({"version": __version__})

    async def metrics(self, request: Request) -> Response:
        """Metrics in Prometheus' text format, or in OpenMetrics' where it is asked for."""
        body, content_type = self._service.metrics.exposition(request.headers.get("accept", ""))
        return Response(body, headers={"Content-Type": content_type})

    async def models(self, request: Request) -> Response:
        """The model that is served, under each of its names."""
        self._client(request)
        return answer_json(self._service.protocol.models())

    async def model(self, request: Request, model: str) -> Response:
        """One of the names."""
        self._client(request)
        return answer_json(self._service.protocol.model(model))

    async def chat_completions(self, request: Request) -> Response:
        """Answer a conversation."""
        return await self._generate(request, "chat", ChatCompletionRequest, self._service.protocol.chat_completion)

    async def completions(self, request: Request) -> Response:
        """Complete texts."""
        return await self._generate(request, "completion", CompletionRequest, self._service.protocol.completion)

    async def chat(self, request: Request) -> Response:
        """Answer a single prompt: the request of clients that know nothing of OpenAI's."""
        return await self._generate(request, "simple_chat", SimpleChatRequest, self._service.protocol.simple_chat)

    async def tokenize(self, request: Request) -> Response:
        """The token ids of a text or a conversation."""
        return await self._convert(request, TokenizeRequest, self._service.protocol.tokenize)

    async def detokenize(self, request: Request) -> Response:
        """The text of token ids."""
        return await self._convert(request, DetokenizeRequest, self._service.protocol.detokenize)

    async def _convert(
        self, request: Request, model: type[BodyT], convert: Callable[[BodyT], dict[str, Any]]
    ) -> Response:
        service = self._service
        with service.limits.request(self._client(request)), service.bodies.body() as hold:
            service.readers.check()
            body = await self._body(request, hold)
            return answer_json(await service.readers.run(lambda: convert(parse_request(model, body))))

    async def _generate(
        self, request: Request, kind: str, model: type[BodyT], make: Callable[[BodyT, str], Answering]
    ) -> Response:
        service = self._service
        async with contextlib.AsyncExitStack() as stack:
            client = self._client(request)
            service.require_ready()
            counted = stack.enter_context(contextlib.ExitStack())
            counted.enter_context(service.limits.request(client))
            stack.enter_context(service.generating())
            with service.queue.prepare():
                answering = await self._prepared(request, model, make)
            generation = await stack.enter_async_context(self._begin(request, kind, answering))
            states = generation.states()
            if not answering.stream:
                outputs = await unless_gone(request, generation.outputs())
                return answer_json(answering.response(outputs))
            # An error that comes before the first output still has a status of its own.
            first = await unless_gone(request, anext(states))
            told_late = partial(self._told_late, request)
            parts = events(answering, chained(first, states), told_late, counted.close)
            return EventStream(parts, stack.pop_all())

    async def _prepared(
        self, request: Request, model: type[BodyT], make: Callable[[BodyT, str], Answering]
    ) -> Answering:
        """Read a request; its body is kept no longer than that takes."""
        service = self._service
        with service.bodies.body() as hold:
            body = await self._body(request, hold)
            preparing = service.prepare(lambda: make(parse_request(model, body), uuid.uuid4().hex))
            return await unless_gone(request, preparing)

    def _begin(self, request: Request, kind: str, answering: Answering) -> Generation:
        """Admit a request's completions and start them."""
        service = self._service
        with contextlib.ExitStack() as held:
            places = service.queue.admit(sum(one.sampling_params.n for one in answering.requests))
            admission = held.enter_context(places)
            self._trace(request, kind, answering)
            exchange = seen(request).exchange = Exchange(
                kind,
                answering,
                service.generate,
                service.metrics,
                max_time=service.options.request_timeout,
                draw_seeds=service.draw_seeds,
                arrival_time=seen(request).arrival_time,
            )
            held.callback(lambda: setattr(admission, "finished", exchange.finished))
            return Generation(exchange.generate, exchange.requests, held.pop_all().close)

    def _trace(self, request: Request, kind: str, answering: Answering) -> None:
        known, first = seen(request), answering.requests[0]
        traced = TracedRequest(
            "text_completion" if kind == "completion" else "chat",
            known.id,
            answering.id,
            self._service.model_names[0],
            request.scope["route"].path,
            first.sampling_params,
            answering.stream,
            known.arrival_time,
        )
        known.span = self._service.tracing.started(traced, request.headers)

    async def _body(self, request: Request, hold: Callable[[int], None]) -> bytes:
        options = self._service.options
        return await read_body(request, max_size=options.max_body_size, timeout=options.body_timeout, hold=hold)

    def _client(self, request: Request) -> str:
        """Whose limits a request counts for: its key's, or without keys its address's."""
        owner = self._service.keys.check(request.headers.get("authorization"))
        return owner or (request.client.host if request.client else "")

    def _told_late(self, request: Request, error: Exception) -> dict[str, Any]:
        """The error event of an answer whose status is sent already."""
        found = told(error)
        seen(request).fail(error, found)
        return found.body()


class ErrorMiddleware:
    """Answers what the routes raise. Starlette's own would raise what it does not know again, and log it twice."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve as an ASGI application."""
        started = False

        async def send_on(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._app(scope, receive, send_on)
        except Exception as error:
            answer = await answer_error(Request(scope), error)
            if not started:  # else the connection is closed amid the answer
                await answer(scope, receive, send)


async def answer_error(request: Request, error: Exception) -> Response:
    """An exception as an answer in OpenAI's format."""
    if isinstance(error, ClientGone):
        return Response(status_code=_CLIENT_GONE)
    found = _of_http(request, error) if isinstance(error, HTTPException) else told(error)
    seen(request).fail(error, found)
    body = {"error": found.message} if request.scope["path"] == SIMPLE_CHAT else found.body()
    return answer_json(body, status=found.status, headers=found.headers)


def _of_http(request: Request, error: HTTPException) -> ApiError:
    method, path = request.method, request.scope["path"]
    if error.status_code == 404:
        message = f"there is nothing at {path}; /openapi.json lists what there is"
    elif error.status_code == 405:
        message = f"{path} does not take {method}; it takes {(error.headers or {}).get('Allow', 'other methods')}"
    else:
        message = str(error.detail)
    return ApiError(error.status_code, message, headers=dict(error.headers or {}))


def answer_json(data: Any, *, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """An answer of JSON."""
    return Response(encode_json(data), status, dict(headers or {}), media_type="application/json")
