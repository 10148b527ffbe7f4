"""Which Host headers are served: a page in a browser can make a name of its own stand for 127.0.0.1."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from npu_zoo.protocol.errors import ApiError

_SHOWN = 80


class KnownHosts:
    """Starlette's check of the Host header, with an error in this server's format.

    Args:
        answer: makes the answer of an error.
    """

    def __init__(
        self, app: ASGIApp, hosts: Sequence[str], answer: Callable[[Request, Exception], Awaitable[Response]]
    ) -> None:
        self._app, self._hosts, self._answer = app, hosts, answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve as an ASGI application."""
        known = False

        async def note(scope: Scope, receive: Receive, send: Send) -> None:
            nonlocal known
            known = True

        await TrustedHostMiddleware(note, self._hosts, www_redirect=False)(scope, receive, _drop)
        if known:
            await self._app(scope, receive, send)
            return
        request = Request(scope)
        host = request.headers.get("host", "")[:_SHOWN]
        message = f"this server does not answer to the host {host!r}; --allowed-host makes it answer to a further one"
        await (await self._answer(request, ApiError(400, message)))(scope, receive, send)


async def _drop(message: Message) -> None:
    """Starlette's own answer is not sent."""
