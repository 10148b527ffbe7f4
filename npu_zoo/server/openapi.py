"""The OpenAPI document: what FastAPI knows of the routes, and what these read and answer themselves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from npu_zoo.protocol.requests import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    SimpleChatRequest,
    TokenizeRequest,
)
from npu_zoo.server.answer_schemas import ANSWERS, REFERENCE, Schema, reference
from npu_zoo.server.request_ids import REQUEST_ID_HEADER

JSON = "application/json"
EVENTS = "text/event-stream"

_MODELS = (ChatCompletionRequest, CompletionRequest, SimpleChatRequest, TokenizeRequest, DetokenizeRequest)
_BAD_HOST = "The server does not answer to this Host header."
_UNAUTHORIZED = "The API key is missing or not accepted."
_NO_MODEL = "There is no such model."
_RATE = "The client has sent too much; Retry-After says when to try again."
_READ = {"400": _BAD_HOST, "401": _UNAUTHORIZED}
_BODY = {
    "400": "The request cannot be met; the message says why.",
    "401": _UNAUTHORIZED,
    "404": _NO_MODEL,
    "408": "The body took too long.",
    "413": "The body is too large.",
    "415": "The body is not JSON.",
    "429": _RATE,
}
_GENERATION = {
    **_BODY,
    "429": "The queue is full, or the client has sent too much; Retry-After says when to try again.",
    "503": "The model is not ready; Retry-After says when to try again.",
}
_RETRY_LATER = {"429", "503"}
_SCHEME = "ApiKey"


@dataclass(frozen=True)
class Answer:
    """What a path answers.

    Attributes:
        content: schemas by media type.
        errors: their meanings by status.
        error: the name of their schema.
        open: whether no API key is asked for.
    """

    content: Mapping[str, Schema]
    errors: Mapping[str, str]
    error: str = "Error"
    open: bool = False


def _of(name: str) -> Mapping[str, Schema]:
    return {JSON: reference(name)}


def _streamed(name: str, chunk: str) -> Mapping[str, Schema]:
    return {JSON: reference(name), EVENTS: _events(chunk)}


def _events(chunk: str) -> Schema:
    """A server-sent event: a chunk or an error, and at the end a mark."""
    data = {"contentMediaType": JSON, "contentSchema": {"anyOf": [reference(chunk), reference("Error")]}}
    return {
        "type": "object",
        "required": ["data"],
        "properties": {"data": {"type": "string", "anyOf": [{"const": "[DONE]"}, data]}},
    }


_METRICS: Mapping[str, Schema] = {
    "text/plain": {"type": "string", "description": "Prometheus' text format."},
    "application/openmetrics-text": {"type": "string", "description": "OpenMetrics, where Accept asks for it."},
}
_CHAT = _streamed("ChatCompletion", "ChatCompletionChunk")
_OPEN = {"400": _BAD_HOST}
_READINESS = Answer(_of("Health"), _OPEN, open=True)

_ANSWERS = {
    "/health": _READINESS,
    "/health/live": Answer(_of("Health"), _OPEN, open=True),
    "/health/ready": _READINESS,
    "/version": Answer(_of("Version"), _OPEN, open=True),
    "/metrics": Answer(_METRICS, _OPEN, open=True),
    "/v1/models": Answer(_of("Models"), _READ),
    "/v1/models/{model}": Answer(_of("Model"), {**_READ, "404": _NO_MODEL}),
    "/v1/chat/completions": Answer(_CHAT, _GENERATION),
    "/v1/completions": Answer(_streamed("Completion", "CompletionChunk"), _GENERATION),
    "/chat": Answer(_CHAT, _GENERATION, error="SimpleError"),
    "/tokenize": Answer(_of("Tokens"), _BODY),
    "/detokenize": Answer(_of("DetokenizedText"), _BODY),
}


def body_of(model: type[BaseModel]) -> dict[str, Any]:
    """What a route's description says of the body that it reads."""
    return {"requestBody": {"required": True, "content": {JSON: {"schema": reference(model.__name__)}}}}


def describe(app: FastAPI, *, keys: bool) -> dict[str, Any]:
    """The document, made once.

    Args:
        keys: whether requests need an API key.
    """
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version=app.version, routes=app.routes)
        _, definitions = models_json_schema([(model, "validation") for model in _MODELS], ref_template=REFERENCE)
        components = document.setdefault("components", {})
        components["schemas"] = {**_any_of(definitions["$defs"]), **ANSWERS}
        if keys:
            components["securitySchemes"] = {_SCHEME: {"type": "http", "scheme": "bearer"}}
        for path, operations in document["paths"].items():
            for operation in operations.values():
                _describe(operation, _ANSWERS[path], keys=keys)
        app.openapi_schema = document
    return app.openapi_schema


def _describe(operation: dict[str, Any], answer: Answer, *, keys: bool) -> None:
    found = {"200": _response("The answer.", answer.content)}
    found |= {status: _response(text, _of(answer.error), status) for status, text in answer.errors.items()}
    if answer is _READINESS:
        found["503"] = _response("Requests are not taken now.", answer.content)
    operation["responses"] = found
    if keys and not answer.open:
        operation["security"] = [{_SCHEME: []}]


def _response(description: str, content: Mapping[str, Schema], status: str = "200") -> dict[str, Any]:
    headers: dict[str, Any] = {REQUEST_ID_HEADER: {"required": True, "schema": {"type": "string"}}}
    if status in _RETRY_LATER:
        headers["Retry-After"] = {"required": True, "schema": {"type": "string", "pattern": "^[0-9]+$"}}
    media = {kind: {"itemSchema" if kind == EVENTS else "schema": schema} for kind, schema in content.items()}
    return {"description": description, "headers": headers, "content": media}


def _any_of(schema: Any) -> Any:
    """The schema with the alternatives that may overlap, as an integer is a number too, written as such."""
    if isinstance(schema, list):
        return [_any_of(entry) for entry in schema]
    if isinstance(schema, dict):
        return {"anyOf" if key == "oneOf" else key: _any_of(entry) for key, entry in schema.items()}
    return schema
