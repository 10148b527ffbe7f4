"""Errors in OpenAI's format."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from npu_zoo.core.errors import PromptLengthError, UnsupportedError, UsageError, validation_message

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

_SHOWN = 80  # characters of a given value, or of a field's path, that a message quotes
_MOST_FAULTS = 5
_SAID = {
    "missing": "is required",
    "extra_forbidden": "is no known field",
    "int_type": "must be an integer, not {given}",
    "float_type": "must be a number, not {given}",
    "finite_number": "must be a finite number, not {given}",
    "bool_type": "must be true or false, not {given}",
    "none_required": "must be null, not {given}",
    "string_type": "must be a string, not {given}",
    "list_type": "must be a list, not {given}",
    "dict_type": "must be an object, not {given}",
    "model_type": "must be an object, not {given}",
    "model_attributes_type": "must be an object, not {given}",
    "greater_than": "must be above {gt}, not {given}",
    "greater_than_equal": "must be at least {ge}, not {given}",
    "less_than": "must be below {lt}, not {given}",
    "less_than_equal": "must be at most {le}, not {given}",
    "literal_error": "must be {expected}, not {given}",
    "too_short": "must have at least {min_length} entries, not {actual_length}",
    "too_long": "must have at most {max_length} entries, not {actual_length}",
    "string_too_short": "must have at least {min_length} characters",
    "string_too_long": "must have at most {max_length} characters",
    "string_pattern_mismatch": "must match {pattern}, and {given} does not",
}


class ApiError(Exception):
    """What a client is told in place of an answer.

    Attributes:
        status: of HTTP.
        type: OpenAI's kind of error, such as ``invalid_request_error``.
        param: the field that is to blame, as a dotted path.
        code: what a program can tell the error by, such as ``context_length_exceeded``.
        headers: of HTTP that go with it.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self.headers = dict(headers or {})
        self.status, self.message, self.type, self.code = status, _encodable(message), type, code
        self.param = None if param is None else _encodable(param)
        super().__init__(self.message)

    def body(self) -> dict[str, Any]:
        """The error as OpenAI's API writes it."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


def api_error(exception: BaseException) -> ApiError:
    """What a client is told of an exception.

    Faults of the request are told in full; of anything else it learns no more than that it was not the request's.
    """
    if isinstance(exception, ApiError):
        return exception
    if isinstance(exception, ValidationError):
        return _of_validation(exception)
    if isinstance(exception, PromptLengthError):
        return ApiError(400, str(exception), code="context_length_exceeded")
    if isinstance(exception, (UsageError, UnsupportedError)):
        return ApiError(400, str(exception))
    return ApiError(500, "the server failed on this request; its log says why", type="server_error")


def shorten(text: str) -> str:
    """What a client has written, as far as a message quotes it."""
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def dotted(path: Iterable[str | int]) -> str:
    """A field's place in a request, as messages and ``param`` have it."""
    return shorten(".".join(map(str, path)))


def describe(value: Any) -> str:
    """A given value as part of a sentence."""
    if isinstance(value, Mapping):
        return "an object"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "a list"
    try:
        shown = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):  # an integer of thousands of digits among them
        return f"this {type(value).__name__}"
    return shown if len(shown) <= _SHOWN else f"{shorten(shown)} ({len(shown)} characters)"


def _of_validation(error: ValidationError) -> ApiError:
    faults = error.errors(include_url=False)
    said = [f"{path} {_sentence(fault)}" if (path := _path(fault)) else _sentence(fault) for fault in faults]
    more = [f"and {len(said) - _MOST_FAULTS} more faults"] if len(said) > _MOST_FAULTS else []
    return ApiError(400, "; ".join([*said[:_MOST_FAULTS], *more]), param=_path(faults[0]) or None)


def _path(fault: ErrorDetails) -> str:
    """The field's dotted path; names in angle brackets are those of alternatives, which no client knows of."""
    steps = [step for step in fault["loc"] if not (str(step).startswith("<") and str(step).endswith(">"))]
    field = fault.get("ctx", {}).get("field")
    return dotted([*steps, field] if field else steps)


def _sentence(fault: ErrorDetails) -> str:
    template = _SAID.get(fault["type"])
    if template is None:
        return validation_message(fault)
    context = {
        name: f"{value:g}" if isinstance(value, float) else value for name, value in fault.get("ctx", {}).items()
    }
    return template.format_map({**context, "given": describe(fault["input"])})


def _encodable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()


def error_text(data: Any) -> str:
    """The message of OpenAI's error object, or of what other servers send in its place; empty where there is none."""
    found = data.get("error", data) if isinstance(data, dict) else data or ""
    if isinstance(found, dict):
        found = found.get("message") or found.get("detail") or ""
    return found if isinstance(found, str) else json.dumps(found)
