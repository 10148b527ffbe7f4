"""From the bytes of a request's body to a checked request."""

from __future__ import annotations

import json
from typing import Any, NoReturn, TypeVar

from pydantic import BaseModel, ValidationError

from npu_zoo.protocol.errors import ApiError, api_error

Model = TypeVar("Model", bound=BaseModel)

MAX_DEPTH = 64
"""Lists and objects within each other; deeper ones are of no use and cost recursion."""


def parse_request(model: type[Model], body: bytes) -> Model:
    """A request of one of the models of :mod:`npu_zoo.protocol.requests`, from JSON in UTF-8.

    Raises:
        ApiError: 400 that names what is wrong: the place in the JSON, or the field.
    """
    return validate_request(model, parse_json(body))


def validate_request(model: type[Model], data: Any) -> Model:
    """The same from parsed JSON.

    Raises:
        ApiError: 400 that names the field.
    """
    if not isinstance(data, dict):
        raise ApiError(400, f"the body is a JSON object, not {_kind(data)}")
    check_text(data)
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise api_error(error) from None


def parse_json(body: bytes) -> Any:
    """What a body says.

    Raises:
        ApiError: 400; it is no UTF-8 or no JSON, or holds NaN, Infinity or a number beyond all bounds.
    """
    try:
        return json.loads(body.decode("utf-8-sig"), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise ApiError(400, f"the body is not UTF-8: byte {error.start} ({error.reason})") from None
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise ApiError(400, f"the body is not JSON: {error.msg} at {where}") from None
    except RecursionError:
        raise ApiError(400, f"the body nests deeper than {MAX_DEPTH} levels") from None
    except ValueError:
        raise ApiError(400, "the body holds an integer of thousands of digits") from None


def check_text(data: Any) -> None:
    """Look through parsed JSON for what no field takes.

    Raises:
        ApiError: 400 that names the field of text with half a surrogate pair, or of nesting beyond :data:`MAX_DEPTH`.
    """
    pending: list[tuple[tuple[str | int, ...], Any]] = [((), data)]
    while pending:
        path, value = pending.pop()
        if len(path) > MAX_DEPTH:
            raise ApiError(400, f"{_dotted(path[:3])} nests deeper than {MAX_DEPTH} levels", param=_dotted(path[:3]))
        if isinstance(value, str):
            _check_string(path, value)
        elif isinstance(value, dict):
            for key in value:
                _check_string((*path, key), key)
            pending.extend(
                ((*path, key), entry) for key, entry in value.items() if isinstance(entry, (str, dict, list))
            )
        elif isinstance(value, list):
            pending.extend(((*path, i), entry) for i, entry in enumerate(value) if isinstance(entry, (str, dict, list)))


def _check_string(path: tuple[str | int, ...], text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        fault = f"holds {text[error.start]!a} at {error.start}, half a surrogate pair, which is no character"
        raise ApiError(400, f"{_dotted(path)} {fault}", param=_dotted(path)) from None


def _dotted(path: tuple[str | int, ...]) -> str:
    return ".".join(map(str, path))


def _refuse_constant(name: str) -> NoReturn:
    raise ApiError(400, f"the body holds {name}, which is no number in JSON")


def _kind(data: Any) -> str:
    return "a list" if isinstance(data, list) else "null" if data is None else f"a {type(data).__name__}"
