"""Answers of a server that speaks OpenAI's API.

The standard library's client does: one request at a time, whose body is read as it comes, and whose connection is
closed to stop it. It honours HTTPS_PROXY and NO_PROXY, and the base install needs no other client.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any, cast

from npu_zoo import __version__
from npu_zoo.cli.answers import Answerer, AnswerState, ConversationTooLongError, Messages
from npu_zoo.cli.interrupts import InterruptFlag
from npu_zoo.cli.output import note
from npu_zoo.cli.results import printable
from npu_zoo.core.errors import NpuZooError
from npu_zoo.protocol.errors import error_text
from npu_zoo.protocol.server_address import ServerAddress, bearer
from npu_zoo.protocol.sse import EventReader, EventTooLongError

CONNECT_TIMEOUT_S = 30.0
"""How long a server may take to list its models."""

ANSWER_TIMEOUT_S = 600.0
"""How long an answer may stay silent: a busy server queues requests."""

_MAX_BODY = 2**20
_MAX_SAID = 500  # characters of an error that are shown
_DONE = "[DONE]"


class ServerError(NpuZooError):
    """A server refuses, fails or cannot be reached."""


class OpenAIServer:
    """A server's routes below ``/v1``.

    Args:
        url: such as ``http://localhost:8000``; ``/v1`` at its end makes no difference.
        api_key: sent as a bearer token.

    Raises:
        ConfigError: the URL is none, or the key cannot stand in a header.
    """

    def __init__(self, url: str, api_key: str | None = None) -> None:
        address = ServerAddress.parse(url, "--server")
        self.host = address.host
        self._base = address.api
        self._headers = {"User-Agent": f"npu-zoo/{__version__}", "Accept-Encoding": "identity"}
        if api_key:
            self._headers["Authorization"] = bearer(api_key)
            if not (address.encrypted or address.loopback):
                note(f"the API key goes to {self.host} without encryption; use https where others can listen")
        self._opener = _build_opener(direct=address.loopback)

    def models(self) -> list[str]:
        """The names of the models it serves.

        Raises:
            ServerError: it cannot be reached, refuses, or answers with something else.
        """
        with self._open("/models", None, CONNECT_TIMEOUT_S) as response:
            data = _parsed_body(_read_limited(response), self.host)
        try:
            return [str(entry["id"]) for entry in data["data"]]
        except (KeyError, TypeError):
            raise ServerError(f"{self.host} lists no models at /v1/models; name one with --model") from None

    def post(self, route: str, body: Mapping[str, Any]) -> http.client.HTTPResponse:
        """The answer to a POST, with its body still to be read.

        Raises:
            ServerError: it cannot be reached, or refuses.
        """
        return self._open(route, json.dumps(body).encode(), ANSWER_TIMEOUT_S)

    def _open(self, route: str, body: bytes | None, timeout: float) -> http.client.HTTPResponse:
        headers = {**self._headers, **({"Content-Type": "application/json"} if body else {})}
        request = urllib.request.Request(self._base + route, data=body, headers=headers)
        try:
            return cast("http.client.HTTPResponse", self._opener.open(request, timeout=timeout))
        except urllib.error.HTTPError as error:
            with error:
                raise _refusal(error, self.host) from error
        except urllib.error.URLError as error:
            raise ServerError(f"{self.host} cannot be reached: {error.reason}; does the server run there?") from error
        except (OSError, http.client.HTTPException) as error:
            raise ServerError(f"{self.host} gave no answer: {_reason(error)}") from error


class ServerAnswerer(Answerer):
    """A model behind a server.

    Args:
        model: None for the first of those that it serves.
        parameters: further members of each request, such as temperature.

    Raises:
        ServerError: no model was named, and the server names none.
    """

    def __init__(self, server: OpenAIServer, model: str | None, parameters: Mapping[str, Any]) -> None:
        self.server = server
        self.model = model or _first_model(server)
        self.parameters = dict(parameters)
        self.title = printable(f"{self.model} at {server.host}")

    def answer(self, messages: Messages, interrupted: InterruptFlag) -> Generator[AnswerState, None, None]:
        """See :meth:`Answerer.answer`; closing it closes the connection, which is how a server learns of it."""
        body = {**self.parameters, "model": self.model, "messages": list(messages), "stream": True}
        try:
            with interrupted.waiting():
                response = self.server.post("/chat/completions", body)
        except KeyboardInterrupt:
            return
        with contextlib.closing(response):
            answer, reasoned = "", False
            for delta in self._deltas(response, interrupted):
                reasoning, text = _said(delta, "reasoning_content", "reasoning"), _said(delta, "content")
                reasoned = reasoned or bool(reasoning)
                gap = "\n\n" if text and not answer and reasoned else ""
                answer += text
                yield AnswerState(reasoning, gap + text, answer)

    def _deltas(self, response: http.client.HTTPResponse, interrupted: InterruptFlag) -> Iterator[Mapping[str, Any]]:
        """What each chunk adds to the message."""
        if response.headers.get_content_type() != "text/event-stream":
            yield self._whole_message(response, interrupted)
            return
        complete = False
        for data in self._events(response, interrupted):
            if data == _DONE:
                return
            choice = _choice(_parsed_body(data, self.server.host), self.server.host)
            complete = complete or choice.get("finish_reason") is not None
            delta = choice.get("delta")
            if isinstance(delta, dict):
                yield delta
        if not complete and not interrupted():
            raise ServerError(f"the connection to {self.server.host} was lost in the middle of the answer")

    def _whole_message(self, response: http.client.HTTPResponse, interrupted: InterruptFlag) -> Mapping[str, Any]:
        """The message of a server that does not stream."""
        try:
            with interrupted.waiting():
                body = _read_limited(response)
        except KeyboardInterrupt:
            return {}
        message = _choice(_parsed_body(body, self.server.host), self.server.host).get("message")
        return message if isinstance(message, dict) else {}

    def _events(self, response: http.client.HTTPResponse, interrupted: InterruptFlag) -> Iterator[str]:
        reader = EventReader()
        while chunk := self._read(response, interrupted):
            try:
                yield from reader.feed(chunk)
            except EventTooLongError:
                raise ServerError(f"{self.server.host} sends what is no stream of tokens") from None

    def _read(self, response: http.client.HTTPResponse, interrupted: InterruptFlag) -> bytes:
        """A further piece of the body; nothing at its end, and after a Ctrl-C."""
        try:
            with interrupted.waiting():
                return response.read1(65536)
        except KeyboardInterrupt:
            return b""
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise ServerError(
                f"the connection to {self.server.host} was lost in the middle of the answer: {_reason(error)}"
            ) from error


def _first_model(server: OpenAIServer) -> str:
    names = server.models()
    if not names:
        raise ServerError(f"{server.host} serves no model; name one with --model if it loads them on request")
    if len(names) > 1:
        note(printable(f"{server.host} serves {', '.join(names)}; this is {names[0]}, --model names another"))
    return names[0]


def _choice(data: Any, host: str) -> Mapping[str, Any]:
    """The first choice of a chunk or an answer; empty in chunks that have none, such as that of the usage."""
    if isinstance(data, dict) and data.get("error"):
        raise ServerError(f"{host}: {_shown(error_text(data))}")
    choices = data.get("choices") if isinstance(data, dict) else None
    if not isinstance(choices, list):
        raise ServerError(f"{host} sends JSON that is no answer; does it speak OpenAI's API?")
    return choices[0] if choices and isinstance(choices[0], dict) else {}


def _said(delta: Mapping[str, Any], *names: str) -> str:
    return next((value for name in names if isinstance(value := delta.get(name), str) and value), "")


def _refusal(error: urllib.error.HTTPError, host: str) -> NpuZooError:
    """What a status from 300 on says, with what can be done about it."""
    try:
        data = json.loads(error.read(_MAX_BODY))
    except (OSError, http.client.HTTPException, ValueError, RecursionError):
        data = {}
    said = error_text(data)
    wait = str(error.headers.get("Retry-After") or "").strip()
    hints = {
        404: "" if said else "; does it speak OpenAI's API, and is --model one of its models?",
        401: "; put your key into NPU_ZOO_API_KEY, or name its variable with --api-key-env",
        429: f"; try again in {wait} s" if wait.isdigit() else "; try again later",
        503: f"; try again in {wait} s" if wait.isdigit() else "",
    }
    if error.code < 400:
        said = f"it redirects to {error.headers.get('Location')}, which --server may name"
    text = f"{host} answers {error.code} {error.reason}" + (f": {said}" if said else "")
    kind = ConversationTooLongError if _code(data) == "context_length_exceeded" else ServerError
    return kind(_shown(text) + hints.get(error.code, ""))


def _code(data: Any) -> Any:
    """What a program can tell OpenAI's error object by."""
    found = data.get("error") if isinstance(data, dict) else None
    return found.get("code") if isinstance(found, dict) else None


def _shown(text: str) -> str:
    """A server's words, in one line and harmless to a terminal."""
    text = printable(" ".join(text.split()))
    return text if len(text) <= _MAX_SAID else text[:_MAX_SAID] + "…"


def _parsed_body(body: str | bytes, host: str) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        raise ServerError(f"{host} sends what is no JSON; is there an OpenAI-compatible server?") from None


def _read_limited(response: http.client.HTTPResponse) -> bytes:
    try:
        return response.read(_MAX_BODY)
    except (OSError, http.client.HTTPException) as error:
        raise ServerError(f"an answer broke off: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__


def _build_opener(*, direct: bool) -> urllib.request.OpenerDirector:
    """An opener that follows no redirect, so that a key and a conversation go to the server that was named alone.

    Args:
        direct: past any proxy, which could not reach this machine's own servers.
    """
    opener = urllib.request.OpenerDirector()
    handlers: Sequence[urllib.request.BaseHandler] = (
        urllib.request.ProxyHandler({} if direct else None),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.UnknownHandler(),
    )
    for handler in handlers:
        opener.add_handler(handler)
    return opener
