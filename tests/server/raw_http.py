"""A client that does nothing of its own accord: bytes go out as a test gives them, and answers come in one by one."""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import socket
import ssl
import struct
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from email.message import Message
from typing import Any
from urllib.parse import urlsplit

SECONDS = 60.0
"""How long anything may take on a machine that is busy."""

_SECONDS_BETWEEN_LOOKS = 0.02


def wait_until(condition: Callable[[], Any], seconds: float = SECONDS) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    return found


@dataclass
class Answer:
    status: int
    headers: Message
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """The error, which must have OpenAI's form and nothing else."""
        found: dict[str, Any] = self.json["error"]
        assert list(self.json) == ["error"]
        assert set(found) == {"message", "type", "param", "code"}
        assert self.headers.get_content_type() == "application/json"
        return found

    @property
    def texts(self) -> list[str]:
        return [choice["text"] for choice in self.json["choices"]]


class Connection(contextlib.AbstractContextManager["Connection"]):
    """One connection to a server.

    Args:
        url: of the server; https asks for ``context``.
        read_size: bytes that the system takes in before the test reads them; its own choice when unset.
    """

    def __init__(self, url: str, context: ssl.SSLContext | None = None, read_size: int | None = None) -> None:
        parts = urlsplit(url)
        assert parts.hostname
        assert parts.port
        self.host = parts.netloc
        family = socket.AF_INET6 if ":" in parts.hostname else socket.AF_INET
        self.socket = socket.socket(family)
        self.socket.settimeout(SECONDS)
        if read_size is not None:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, read_size)
        try:
            self.socket.connect((parts.hostname, parts.port))
            if context is not None:
                self.socket = context.wrap_socket(self.socket, server_hostname=parts.hostname)
        except OSError:
            self.socket.close()
            raise
        self._reader = _Reader(self.socket)

    def __exit__(self, *error: object) -> None:
        self.close()

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def ask(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: Mapping[str, str | None] | None = None,
        version: str = "1.1",
    ) -> None:
        """Send a request; a header that is None is left out."""
        self.send(head(method, path, {"Host": self.host, **_of_body(body), **(headers or {})}, version) + (body or b""))

    def post(self, path: str, body: object, headers: Mapping[str, str | None] | None = None) -> None:
        self.ask("POST", path, json.dumps(body).encode(), headers)

    def answer(self, method: str = "POST") -> Answer:
        """The next answer, whole. Raises ConnectionError or http.client.HTTPException where the server breaks off."""
        response = self.begin(method)
        return Answer(response.status, response.headers, response.read())

    def begin(self, method: str = "POST") -> http.client.HTTPResponse:
        """The next answer's head."""
        response = http.client.HTTPResponse(self._reader, method=method)  # type: ignore[arg-type]
        response.begin()
        return response

    def events(self) -> Iterator[str]:
        """The data of the events of a stream, which must have begun with status 200; raises as :meth:`answer` does."""
        response = self.begin()
        assert response.status == 200, response.read()
        assert response.headers.get_content_type() == "text/event-stream"
        text = b""
        while part := response.read1():
            *events, text = (text + part).split(b"\n\n")
            yield from (event.removeprefix(b"data: ").decode() for event in events if not event.startswith(b":"))
        assert not text

    def closed(self) -> bool:
        """Whether the server closes the connection, all else having been read; waits for either."""
        try:
            return self._reader.makefile("rb").read(1) == b""
        except ConnectionError:
            return True

    def open_and_silent(self) -> bool:
        """Whether the server has neither sent anything more nor closed the connection."""
        self.socket.setblocking(False)
        try:
            return self.socket.recv(1) is None
        except (BlockingIOError, ssl.SSLWantReadError):
            return True
        finally:
            self.socket.settimeout(SECONDS)

    def half_close(self) -> None:
        self.socket.shutdown(socket.SHUT_WR)

    def reset(self) -> None:
        """Leave without a farewell: the server gets an RST."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close()

    def close(self) -> None:
        self._reader.end()
        self.socket.close()


class _Reader:
    """What an HTTPResponse takes for a socket; answers that come after one another share its buffer."""

    def __init__(self, connection: socket.socket) -> None:
        self._buffer = _Lasting(connection.makefile("rb", buffering=0))

    def makefile(self, mode: str) -> io.BufferedReader:
        return self._buffer

    def end(self) -> None:
        io.BufferedReader.close(self._buffer)


class _Lasting(io.BufferedReader):
    def close(self) -> None:
        """An HTTPResponse that has ended does not end the connection."""


def head(method: str, path: str, headers: Mapping[str, str | None], version: str = "1.1") -> bytes:
    lines = [f"{method} {path} HTTP/{version}", *(f"{n}: {value}" for n, value in headers.items() if value is not None)]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


def _of_body(body: bytes | None) -> dict[str, str | None]:
    return {} if body is None else {"Content-Type": "application/json", "Content-Length": str(len(body))}


def ask(
    url: str, method: str, path: str, body: object = None, headers: Mapping[str, str | None] | None = None
) -> Answer:
    """One request over a connection of its own."""
    with Connection(url) as connection:
        connection.ask(method, path, None if body is None else json.dumps(body).encode(), headers)
        return connection.answer(method)
