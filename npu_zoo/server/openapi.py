"""The OpenAPI document: what FastAPI knows of the routes, and the forms of bodies, which the routes read themselves."""

from __future__ import annotations

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

_MODELS = (ChatCompletionRequest, CompletionRequest, SimpleChatRequest, TokenizeRequest, DetokenizeRequest)
_SCHEMAS = "#/components/schemas/{model}"
_ERRORS = {
    "400": "The request cannot be met; the message says why.",
    "401": "The API key is missing or not accepted.",
    "404": "There is no such model.",
    "408": "The body took too long.",
    "413": "The body is too large.",
    "415": "The body is not JSON.",
    "429": "The queue is full, or the client has sent too much; Retry-After says when to try again.",
    "503": "The model is not ready.",
}
_ERROR: dict[str, Any] = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


def body_of(model: type[BaseModel]) -> dict[str, Any]:
    """What a route's description says of the body that it reads."""
    schema = {"$ref": _SCHEMAS.format(model=model.__name__)}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def describe(app: FastAPI) -> dict[str, Any]:
    """The document, made once."""
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version=app.version, routes=app.routes)
        _, definitions = models_json_schema([(model, "validation") for model in _MODELS], ref_template=_SCHEMAS)
        schemas = document.setdefault("components", {}).setdefault("schemas", {})
        schemas.update(definitions["$defs"], Error=_ERROR)
        for operations in document["paths"].values():
            for operation in operations.values():
                _add_errors(operation)
        app.openapi_schema = document
    return app.openapi_schema


def _add_errors(operation: dict[str, Any]) -> None:
    content = {"application/json": {"schema": {"$ref": _SCHEMAS.format(model="Error")}}}
    operation["responses"].pop("422", None)
    for status, meaning in _ERRORS.items():
        operation["responses"][status] = {"description": meaning, "content": content}
