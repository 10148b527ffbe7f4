"""The protocol of connections with an application of a few lines, in this process."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn

from npu_zoo.server.http_protocol import protocol_with

from .raw_http import wait_until

LARGE = 4_000_000
"""More than the system's buffers of both sides take, sent in parts."""

HUGE = 12_000_000
"""Several times as much, sent at once."""


class Application:
    """Echoes bodies; its paths say how else it is to behave.

    Attributes:
        left: paths whose clients went away before they were answered.
    """

    def __init__(self) -> None:
        self.left: set[str] = set()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        path = scope["path"]
        body, gone = b"", False
        while path != "/unread":
            message = await receive()
            gone = message["type"] == "http.disconnect"
            body += message.get("body", b"")
            if gone or not message.get("more_body"):
                break
        if path.startswith("/wait") and not gone:
            gone = (await receive())["type"] == "http.disconnect"
        if gone:
            self.left.add(path)
        answer = {"/large": b"x" * LARGE, "/huge": b"x" * HUGE}.get(path, body or b"ok")
        size = HUGE if path == "/huge" else 100_000
        headers = [(b"content-type", b"text/plain"), (b"content-length", str(len(answer)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for start in range(0, len(answer), size):
            more = start + size < len(answer)
            await send({"type": "http.response.body", "body": answer[start : start + size], "more_body": more})


@contextmanager
def served(application: Any, certificate: tuple[Path, Path] | None = None, **limits: float) -> Iterator[str]:
    """The address of a server in a thread of this process."""
    protocol = protocol_with(**{"head_timeout": 60.0, "send_timeout": 60.0, **limits})
    options: dict[str, Any] = {"ws": "none", "lifespan": "off", "log_config": None, "access_log": False}
    if certificate is not None:
        options |= {"ssl_certfile": certificate[0], "ssl_keyfile": certificate[1]}
    config = uvicorn.Config(application, http=protocol, timeout_graceful_shutdown=1, **options)
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"{'https' if certificate else 'http'}://127.0.0.1:{listener.getsockname()[1]}"
        thread = threading.Thread(target=lambda: asyncio.run(server.serve([listener])))
        thread.start()
        try:
            wait_until(lambda: server.started)
            yield url
        finally:
            server.should_exit = True
            thread.join()
