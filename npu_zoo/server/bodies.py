"""Reads a request's body within limits of size and time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from starlette.requests import Request
from starlette.types import Message

from npu_zoo.protocol.errors import ApiError

_JSON = "application/json"
_PLAIN = "identity"
_SHOWN = 80  # characters of a header that a message quotes


class ClientGone(Exception):
    """The client closed its connection; nobody waits for an answer."""


async def read_body(request: Request, *, max_size: int, timeout: float, hold: Callable[[int], None]) -> bytes:
    """A request's body, which says that it is JSON.

    Args:
        max_size: in bytes.
        timeout: seconds that all of it may take.
        hold: called with the bytes of each part before it is kept; raises where there is no room for them.

    Raises:
        ApiError: 415 for another type of content, 413 where it is too large, 408 where it takes too long.
        ClientGone: the client closed its connection.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()[:_SHOWN]
    if kind != _JSON:
        raise ApiError(415, f"the body is {kind or 'of no stated type'}; send JSON with 'Content-Type: {_JSON}'")
    coding = request.headers.get("content-encoding", _PLAIN).strip().lower()
    if coding != _PLAIN:
        raise ApiError(415, f"the body is in the coding {coding[:_SHOWN]!r}; send it plain, without Content-Encoding")
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > max_size:
        raise _too_large(f"{int(declared)} bytes", max_size)
    try:
        return await asyncio.wait_for(_read(request, max_size, hold), timeout)
    except asyncio.TimeoutError:
        raise ApiError(408, f"the body did not arrive within {timeout:g} s") from None


async def _read(request: Request, max_size: int, hold: Callable[[int], None]) -> bytes:
    body = bytearray()
    while True:
        message: Message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        part = message.get("body", b"")
        if len(body) + len(part) > max_size:
            raise _too_large("larger", max_size)
        hold(len(part))
        body += part
        if not message.get("more_body", False):
            return bytes(body)


def _too_large(what: str, max_size: int) -> ApiError:
    return ApiError(413, f"the body is {what}, and {max_size} bytes may be sent; send less, or fewer prompts at a time")
