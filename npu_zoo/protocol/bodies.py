"""From the bytes of a request's body to a checked request."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

from pydantic import BaseModel, ValidationError

from npu_zoo.protocol.errors import ApiError, api_error, dotted

Model = TypeVar("Model", bound=BaseModel)

MAX_DEPTH = 64
"""Lists and objects within each other; deeper ones are of no use and cost recursion."""

MAX_PARTS = 2**18
"""Lists, objects and names in objects; in a body of a few MiB more would take hundreds."""

_STRING = re.compile(rb'"[^"]*"')
_PARTS = (b"[", b"{", b":")
_NEITHER = bytes(set(range(256)) - set(b'"[{:'))


def parse_request(model: type[Model], body: bytes) -> Model:
    """A request of one of the models of :mod:`npu_zoo.protocol.requests`, from JSON in UTF-8.

    Raises:
        ApiError: 400 that names what is wrong: the place in the JSON, or the field.
    """
    return validate_request(model, parse_object(body))


def validate_request(model: type[Model], data: Any) -> Model:
    """The same from parsed JSON.

    Raises:
        ApiError: 400 that names the field.
    """
    check_text(_require_object(data, "the body"))
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise api_error(error) from None


def parse_object(body: bytes, what: str = "the body") -> dict[str, Any]:
    """The JSON object of a body.

    Args:
        what: the body's name in messages.

    Raises:
        ApiError: 400; it is no UTF-8 or no object in JSON, or holds NaN, Infinity, a number beyond all bounds, or more
            than :data:`MAX_PARTS`.
    """
    _check_parts(body, what)
    try:
        text = body.decode("utf-8-sig")
        return _require_object(json.loads(text, parse_constant=_refuse_constant), what)
    except UnicodeDecodeError as error:
        raise ApiError(400, f"{what} is not UTF-8: byte {error.start} ({error.reason})") from None
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if "\n" in text else ""
        raise ApiError(400, f"{what} is not JSON: {error.msg} at {line}column {error.colno}") from None
    except RecursionError:
        raise ApiError(400, f"{what} nests deeper than {MAX_DEPTH} levels") from None
    except ValueError:  # of a number
        raise _number_error(text, what) from None


def _require_object(data: Any, what: str) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise ApiError(400, f"{what} is a JSON object, not {_kind(data)}")
    return data


def check_text(data: Any) -> None:
    """Look through parsed JSON for what no field takes.

    Raises:
        ApiError: 400 that names the field of text with half a surrogate pair, or of nesting beyond :data:`MAX_DEPTH`.
    """
    for path, entry in _walk(data, (str, dict, list)):
        if len(path) > MAX_DEPTH:
            field = dotted(path[:3])
            raise ApiError(400, f"{field} nests deeper than {MAX_DEPTH} levels", param=field)
        if isinstance(entry, str) and not entry.isascii():
            _check_string(path, entry)
        elif isinstance(entry, dict):
            for key in entry:
                if not key.isascii():
                    _check_string((*path, key), key)


def _check_string(path: Sequence[str | int], text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        fault = f"holds {text[error.start]!a} at {error.start}, half a surrogate pair, which is no character"
        field = dotted(path)
        raise ApiError(400, f"{field} {fault}", param=field) from None


def _check_parts(body: bytes, what: str) -> None:
    """Raise for a body that is short and would be large once parsed."""
    if _count_parts(body) > MAX_PARTS and _count_parts(_without_strings(body)) > MAX_PARTS:
        raise ApiError(400, f"{what} has more than {MAX_PARTS} lists, objects and names; send less at a time")


def _count_parts(body: bytes) -> int:
    return sum(map(body.count, _PARTS))


def _without_strings(body: bytes) -> bytes:
    """What a body has of quotes and parts outside of strings."""
    unescaped = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    return _STRING.sub(b"", unescaped.translate(None, _NEITHER))


def _walk(data: Any, kinds: tuple[type, ...]) -> Iterator[tuple[Sequence[str | int], Any]]:
    """Every entry of these kinds in parsed JSON, in order, with its path, which is good until the next one."""
    if isinstance(data, kinds):
        yield (), data
    path: list[str | int] = [""]
    pending, seen = [_members(data)], {*kinds, dict, list}
    while pending:
        for key, entry in pending[-1]:
            if type(entry) not in seen:
                continue
            path[-1] = key
            if isinstance(entry, kinds):
                yield path, entry
            if isinstance(entry, (dict, list)):
                path.append("")
                pending.append(_members(entry))
                break
        else:
            pending.pop()
            path.pop()


def _members(data: Any) -> Iterator[tuple[str | int, Any]]:
    members: Iterable[tuple[str | int, Any]] = enumerate(data) if isinstance(data, list) else ()
    return iter(data.items() if isinstance(data, dict) else members)


@dataclass(frozen=True)
class _NoNumber:
    """Stands in parsed JSON for what no field takes."""

    fault: str


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(name)


def _number_error(text: str, what: str) -> ApiError:
    """The error of JSON with a number that no field takes: the field's, where the rest can be read."""
    try:
        data = json.loads(text, parse_constant=_constant, parse_int=_integer)
    except (ValueError, RecursionError):
        return ApiError(400, f"{what} holds NaN, Infinity or an integer of thousands of digits")
    path, found = next(_walk(data, (_NoNumber,)))
    field = dotted(path)
    return ApiError(400, f"{field or what} {found.fault}", param=field or None)


@functools.cache
def _constant(name: str) -> _NoNumber:
    return _NoNumber(f"is {name}, which is no number in JSON")


def _integer(digits: str) -> int | _NoNumber:
    try:
        return int(digits)
    except ValueError:
        return _NoNumber(f"is an integer of {len(digits)} digits")


def _kind(data: Any) -> str:
    kinds = {list: "a list", str: "a string", bool: "true or false"}
    return "null" if data is None else kinds.get(type(data), "a number")
