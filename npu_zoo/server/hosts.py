"""Which names a server answers to.

A page in a browser can make a name of its own stand for 127.0.0.1 and read what a server there answers; its requests
then have that name in their Host header.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from npu_zoo.protocol.errors import ApiError

_SHOWN = 80
_HOST = re.compile(r"(?:\[(?P<address>[0-9A-Fa-f:.]+)\]|(?P<name>[^\s:/@\[\]]+))(?::\d*)?")


class HostMiddleware:
    """Refuses requests whose Host header names another server.

    Args:
        allowed: names and addresses without ports, in which ``*`` stands for anything.
    """

    def __init__(self, app: ASGIApp, allowed: Sequence[str]) -> None:
        self._app = app
        self._allowed = [host.lower().strip("[]") for host in allowed]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve as an ASGI application.

        Raises:
            ApiError: 400, the name is not served.
        """
        given = Headers(scope=scope).get("host") if scope["type"] == "http" else None
        if given is not None:  # a browser always sends it, a load balancer's HTTP/1.0 may not
            self._check(given)
        await self._app(scope, receive, send)

    def _check(self, given: str) -> None:
        found = _HOST.fullmatch(given.strip())
        host = (found["address"] or found["name"]).lower().rstrip(".") if found else ""
        if not any(fnmatch.fnmatchcase(host, pattern) for pattern in self._allowed):
            raise ApiError(
                400,
                f"this server is not {given[:_SHOWN]!r} but {', '.join(self._allowed)}; --allowed-host adds names",
                code="host_not_allowed",
            )
