"""From the bytes of a request's body to a checked request."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
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
        text = body.decode("utf-8-sig")
        return json.loads(text, parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise ApiError(400, f"the body is not UTF-8: byte {error.start} ({error.reason})") from None
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise ApiError(400, f"the body is not JSON: {error.msg} at {where}") from None
    except RecursionError:
        raise ApiError(400, f"the body nests deeper than {MAX_DEPTH} levels") from None
    except ValueError:  # of a number
        raise _number_error(text) from None


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


@dataclass(frozen=True)
class _NoNumber:
    """Stands in parsed JSON for what no field takes."""

    fault: str


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(name)


def _number_error(text: str) -> ApiError:
    """The error of JSON with a number that no field takes: the field's, where the rest can be read."""
    try:
        data = json.loads(text, parse_constant=_constant, parse_int=_integer)
    except (ValueError, RecursionError):
        return ApiError(400, "the body holds NaN, Infinity or an integer of thousands of digits")
    path, found = next(_no_numbers(data))
    field = _dotted(path)
    return ApiError(400, f"{field or 'the body'} {found.fault}", param=field or None)


def _constant(name: str) -> _NoNumber:
    return _NoNumber(f"is {name}, which is no number in JSON")


def _integer(digits: str) -> int | _NoNumber:
    try:
        return int(digits)
    except ValueError:
        return _NoNumber(f"is an integer of {len(digits)} digits")


def _no_numbers(data: Any) -> Iterator[tuple[tuple[str | int, ...], _NoNumber]]:
    pending: list[tuple[tuple[str | int, ...], Any]] = [((), data)]
    while pending:
        path, value = pending.pop()
        if isinstance(value, _NoNumber):
            yield path, value
        elif isinstance(value, dict):
            pending.extend(((*path, key), entry) for key, entry in value.items())
        elif isinstance(value, list):
            pending.extend(((*path, i), entry) for i, entry in enumerate(value))


def _kind(data: Any) -> str:
    kinds = {list: "a list", str: "a string", bool: "true or false"}
    return "null" if data is None else kinds.get(type(data), "a number")
