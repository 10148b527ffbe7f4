"""Requests over HTTP, and when the pieces of their answers came.

Loaded on use, as it needs aiohttp (extra ``bench``).
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import resource
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import aiohttp

from npu_zoo import __version__
from npu_zoo.evaluation.serving.observation import Failure
from npu_zoo.evaluation.serving.stream import Piece, shown
from npu_zoo.protocol.errors import error_text
from npu_zoo.protocol.server_address import ServerAddress, bearer

CONNECT_TIMEOUT_S = 30.0
KEEP_ALIVE_S = 2.0
"""Shorter than servers keep an idle connection (5 s is common), so that none is closed as a request begins on it."""

_MOST_ERROR_BYTES = 2**16
_STREAM = "text/event-stream"

Clock = Callable[[], float]


@dataclass
class Exchange:
    """One request and what came back, unread.

    Attributes:
        sent: when it was sent.
        ended: when the response had ended, or failed.
        pieces: of the body of a streamed answer.
        failure: of the connection, or another status than 200.
        status: of HTTP; None where none came.
        cancelled: whether it was called off.
    """

    sent: float
    ended: float = 0.0
    pieces: list[Piece] = field(default_factory=list)
    failure: Failure | None = None
    status: int | None = None
    cancelled: bool = False


class Client(contextlib.AbstractAsyncContextManager["Client"]):
    """A server's routes. Redirects are not followed, so that a key goes to the server that was named alone.

    Args:
        api_key: sent as a bearer token.
        timeout: seconds that one request may take in all.

    Raises:
        ConfigError: the key cannot stand in a header.
    """

    def __init__(self, address: ServerAddress, api_key: str | None = None, *, timeout: float = 600.0) -> None:
        self.address = address
        self._headers = {"User-Agent": f"npu-zoo/{__version__}", "Accept-Encoding": "identity"}
        if api_key:
            self._headers["Authorization"] = bearer(api_key)
        self._timeout = aiohttp.ClientTimeout(total=timeout, sock_connect=min(timeout, CONNECT_TIMEOUT_S))

    async def __aenter__(self) -> Client:
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_S)
        proxied = not self.address.loopback
        self._session = aiohttp.ClientSession(
            connector=connector, headers=self._headers, timeout=self._timeout, trust_env=proxied
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self._session.close()

    async def exchange(self, route: str, body: bytes, clock: Clock) -> Exchange:
        """Send a body to a route below ``/v1`` and take the answer; what goes wrong is part of what comes back.

        Nothing is read of the answer while it comes. Being cancelled ends the exchange, and is not raised.
        """
        exchange = Exchange(sent=clock())
        try:
            await self._take(exchange, route, body, clock)
        except asyncio.CancelledError:
            exchange.cancelled = True
        except (aiohttp.ClientError, asyncio.TimeoutError, OSError, ValueError) as error:
            exchange.failure = failure_of(error, answered=exchange.status is not None)
        exchange.ended = clock()
        return exchange

    async def _take(self, exchange: Exchange, route: str, body: bytes, clock: Clock) -> None:
        headers = {"Content-Type": "application/json", "Accept": _STREAM}
        url = self.address.api + route
        async with self._session.post(url, data=body, headers=headers, allow_redirects=False) as response:
            exchange.status = response.status
            if response.status != 200 or response.content_type != _STREAM:
                exchange.failure = await _refusal(response)
                return
            content = response.content
            while data := await content.readany():
                exchange.pieces.append(Piece(clock(), data))

    async def read(self, path: str, body: Mapping[str, Any] | None = None) -> tuple[int, Any]:
        """The status and the JSON of a path, or None in its place; with a body it is posted.

        Raises:
            aiohttp.ClientError, asyncio.TimeoutError, OSError: there is no answer.
        """
        method = "GET" if body is None else "POST"
        timeout = aiohttp.ClientTimeout(total=CONNECT_TIMEOUT_S)
        url = self.address.url + path
        async with self._session.request(method, url, json=body, timeout=timeout, allow_redirects=False) as response:
            data = await response.read()
        try:
            return response.status, json.loads(data)
        except (ValueError, RecursionError):
            return response.status, None


def raise_file_limit() -> None:
    """Let this process have as many connections as it may: the soft limit of open files becomes the hard one."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def failure_of(error: Exception, *, answered: bool) -> Failure:
    """What an exception of the client's says about the request.

    Args:
        answered: whether the answer had begun.
    """
    said = shown(str(error) or type(error).__name__)
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        return Failure(kind="client", message=f"this client has too many open files: {os.strerror(error.errno)}")
    if isinstance(error, asyncio.TimeoutError):
        where = "the answer did not end" if answered else "there was no answer"
        return Failure(kind="time-out", message=f"{where} in time")
    if answered or isinstance(error, (aiohttp.ServerDisconnectedError, ConnectionResetError, BrokenPipeError)):
        return Failure(kind="closed", message=f"the connection was closed: {said}")
    if isinstance(error, aiohttp.ClientConnectorError):
        refused = isinstance(error.os_error, ConnectionRefusedError)
        reason = "the connection was refused" if refused else shown(str(error.os_error) or said)
        return Failure(kind="refused" if refused else "unreachable", message=reason)
    if isinstance(error, aiohttp.ClientOSError):
        return Failure(kind="closed", message=f"the connection was closed: {said}")
    if isinstance(error, (aiohttp.ClientResponseError, ValueError, ssl.SSLError)):
        return Failure(kind="malformed", message=f"no answer in HTTP: {said}")
    return Failure(kind="unreachable", message=said)


async def _refusal(response: aiohttp.ClientResponse) -> Failure:
    """What an answer that is no stream says."""
    data = await response.content.read(_MOST_ERROR_BYTES)
    try:
        said = error_text(json.loads(data))
    except (ValueError, RecursionError):
        said = data.decode("utf-8", "replace")
    if response.status != 200:
        text = f"HTTP {response.status} {response.reason or ''}".rstrip()
        return Failure(kind="status", message=shown(f"{text}: {said}" if said else text))
    return Failure(kind="malformed", message=f"no stream came, but {response.content_type}: {shown(said, 80)}")
