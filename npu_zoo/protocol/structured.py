"""What the output of a request has to look like, as an engine takes it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from npu_zoo.core.errors import UsageError
from npu_zoo.core.sampling import StructuredOutputs
from npu_zoo.engine.prompting import PromptEncoder
from npu_zoo.protocol.errors import ApiError
from npu_zoo.protocol.limits import ProtocolLimits
from npu_zoo.protocol.messages import ResponseFormat
from npu_zoo.protocol.requests import ChatCompletionRequest, SamplingFields, StructuredOutputsField


def structured_outputs(request: SamplingFields, limits: ProtocolLimits) -> StructuredOutputs | None:
    """What ``response_format`` or ``structured_outputs`` asks for; None where the output is free.

    Raises:
        ApiError: 400; both are given, or the description is too large or holds no JSON schema.
    """
    response_format = request.response_format if isinstance(request, ChatCompletionRequest) else None
    if response_format is not None and response_format.type == "text":
        response_format = None
    if response_format is not None and request.structured_outputs is not None:
        message = "structured_outputs and response_format both say what the output looks like; give one of them"
        raise ApiError(400, message, param="structured_outputs")
    if response_format is not None:
        return _of_format(response_format, limits)
    return None if request.structured_outputs is None else _of_field(request.structured_outputs, limits)


Blame = Callable[[StructuredOutputs, str], "tuple[str, str] | None"]


def check_form(
    form: StructuredOutputs | None, field: str, encoder: PromptEncoder, blame: Blame | None = None
) -> StructuredOutputs | None:
    """The form, if outputs can be led along it.

    Args:
        field: of the request, that the form was made of.
        blame: which field inside it is to blame for a fault, and why, where that can be told.

    Raises:
        ApiError: 400 that names the field and what cannot be used of it.
    """
    if form is None:
        return None
    try:
        encoder.check_form(form)
    except UsageError as error:
        _, told, why = str(error).partition(" cannot be used: ")
        field, why = (blame and blame(form, why)) or (field, why)
        message = f"{field} cannot be used: {why}" if told else str(error)
        raise ApiError(400, message, param=field) from error
    return form


def form_field(request: SamplingFields) -> str:
    """The field that says what the output of a request looks like."""
    return "response_format" if request.structured_outputs is None else "structured_outputs"


def _of_format(response_format: ResponseFormat, limits: ProtocolLimits) -> StructuredOutputs:
    if response_format.json_schema is None:
        return StructuredOutputs(json_object=True)
    schema = schema_text(response_format.json_schema.schema_, "response_format.json_schema.schema", limits)
    return StructuredOutputs(json=schema)


def _of_field(given: StructuredOutputsField, limits: ProtocolLimits) -> StructuredOutputs:
    if given.json_ is not None:
        return StructuredOutputs(json=schema_text(given.json_, "structured_outputs.json", limits))
    for name in ("regex", "choice", "grammar"):
        value = getattr(given, name)
        if value:
            limits.check_form(f"structured_outputs.{name}", [value] if isinstance(value, str) else value)
    return StructuredOutputs(
        json_object=bool(given.json_object),
        regex=given.regex,
        choice=tuple(given.choice or ()),
        grammar=given.grammar,
    )


def schema_text(schema: Any, field: str, limits: ProtocolLimits) -> str:
    """A JSON schema as text.

    Args:
        schema: parsed, or text already.

    Raises:
        ApiError: 400 that names the field; it is no JSON, no object or boolean, or too large.
    """
    if isinstance(schema, str):
        limits.check_form(field, [schema])
        schema = _parsed(schema, field)
    if not isinstance(schema, (dict, bool)):
        raise ApiError(400, f"{field} must be a JSON schema: an object, true or false", param=field)
    text = json_text(schema, field)
    limits.check_form(field, [text])
    return text


def json_text(value: Any, field: str) -> str:
    """A part of a request as JSON again.

    Raises:
        ApiError: 400 that names the field; it holds a number that JSON cannot say.
    """
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except ValueError:
        raise ApiError(400, f"{field} holds a number beyond all bounds", param=field) from None


def _parsed(text: str, field: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise ApiError(400, f"{field} must be a JSON schema, and its text is no JSON", param=field) from None
