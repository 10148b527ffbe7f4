"""Faults of the server itself: clients learn that there was one, and the log what it was, once."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncGenerator, Callable, Iterator
from typing import Any

import pytest

from npu_zoo.core.config import EngineConfig
from npu_zoo.core.engine import EngineStats, GenerationRequest, RequestOutput
from npu_zoo.core.errors import EngineError, HardwareError
from npu_zoo.server.app import create_app
from npu_zoo.server.client import EngineClient
from npu_zoo.server.logs import JsonFormatter
from npu_zoo.server.messages import initial_output
from npu_zoo.server.options import ServeOptions
from npu_zoo.server.service import Service

from .protocol_server import served
from .raw_http import Answer, Connection, ask, wait_until

PATH = "/v1/completions"
CHAT = {"model": "deepseek_coder", "messages": [{"role": "user", "content": "a"}]}
SECRET = "/srv/models/secret/layer9.py is upside down"
BODY = {"model": "deepseek_coder", "prompt": "a", "max_tokens": 4}


class FaultyClient(EngineClient):
    """An engine that gives some states and then fails."""

    def __init__(self) -> None:
        super().__init__("nowhere")
        self.states = 0
        self.error: Exception = ValueError(SECRET)

    @property
    def ready(self) -> bool:
        return True

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[RequestOutput, None]:
        output = initial_output(request)
        for _ in range(self.states):
            output.outputs[0].text += "x"
            output.outputs[0].token_ids.append(5)
            yield output
        raise self.error


class Faulty:
    """A server with such an engine, and what it logs."""

    def __init__(self, config: EngineConfig) -> None:
        self.client = FaultyClient()
        self.service = Service(config, ServeOptions(), self.client)
        self.service.metrics.engine_stats(EngineStats())
        self.records: list[dict[str, Any]] = []
        self.url = ""

    def keep(self, text: str) -> None:
        self.records.append(json.loads(text))

    @property
    def failures(self) -> list[dict[str, Any]]:
        return [record for record in self.records if record["level"] == "error" and record["event"] != "request"]

    def assert_told(self, answer: Answer) -> None:
        """The client knows no more than that the server failed, and the log knows the rest."""
        assert answer.status == 500
        assert answer.error["type"] == "server_error"
        self.assert_hidden(answer.body)
        (failure,) = self.failures
        assert SECRET in failure["exception"]
        number = answer.headers["X-Request-Id"]
        assert failure["request_id"] == number
        told = {"event": "request", "request_id": number, "status": 500, "error": "server_error"}
        wait_until(lambda: any(told.items() <= record.items() for record in self.records))

    @staticmethod
    def assert_hidden(body: bytes) -> None:
        assert not [word for word in (b"secret", b".py", b"Error(", b"Traceback", b"ValueError") if word in body]


class _Handler(logging.Handler):
    def __init__(self, keep: Callable[[str], None]) -> None:
        super().__init__()
        self.setFormatter(JsonFormatter())
        self._keep = keep

    def emit(self, record: logging.LogRecord) -> None:
        self._keep(self.format(record))


@pytest.fixture(scope="module")
def started(config: EngineConfig) -> Iterator[Faulty]:
    faulty = Faulty(config)
    with served(create_app(faulty.service)) as faulty.url:
        yield faulty


@pytest.fixture
def faulty(started: Faulty) -> Iterator[Faulty]:
    started.records.clear()
    started.client.__init__()  # type: ignore[misc]
    handler, root = _Handler(started.keep), logging.getLogger()
    root.addHandler(handler)
    for name in ("npu_zoo", "npu_zoo.server", "uvicorn", "uvicorn.error", "asyncio"):
        logging.getLogger(name).propagate = True
    level = root.level
    root.setLevel(logging.INFO)
    try:
        yield started
    finally:
        root.removeHandler(handler)
        root.setLevel(level)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("error", [ValueError(SECRET), EngineError(SECRET), HardwareError(SECRET), KeyError(SECRET)])
def test_an_engine_fails_before_its_first_token(faulty: Faulty, error: Exception, stream: bool) -> None:
    faulty.client.error = error
    faulty.assert_told(ask(faulty.url, "POST", PATH, {**BODY, "stream": stream}))


def test_an_engine_fails_amid_an_answer(faulty: Faulty) -> None:
    faulty.client.states = 2
    faulty.assert_told(ask(faulty.url, "POST", PATH, BODY))


def test_an_engine_fails_amid_a_stream(faulty: Faulty) -> None:
    faulty.client.states = 2
    with Connection(faulty.url) as connection:
        connection.post(PATH, {**BODY, "stream": True})
        *events, last = connection.events()
    assert json.loads(events[-1])["choices"][0]["text"]
    assert json.loads(last)["error"]["type"] == "server_error"
    faulty.assert_hidden(last.encode())
    (failure,) = faulty.failures
    assert SECRET in failure["exception"]


@pytest.mark.parametrize(
    ("name", "path", "body"),
    [
        ("completion", PATH, BODY),
        ("chat_completion", "/v1/chat/completions", CHAT),
        ("tokenize", "/tokenize", {"prompt": "a"}),
        ("detokenize", "/detokenize", {"tokens": [5]}),
        ("models", "/v1/models", None),
    ],
)
def test_what_reads_a_request_fails(
    faulty: Faulty, monkeypatch: pytest.MonkeyPatch, name: str, path: str, body: dict[str, Any] | None
) -> None:
    def fail(*arguments: object) -> None:
        raise RuntimeError(SECRET)

    monkeypatch.setattr(faulty.service.protocol, name, fail)
    faulty.assert_told(ask(faulty.url, "POST" if body else "GET", path, body))


def test_an_answer_that_cannot_be_written(faulty: Faulty, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise RuntimeError(SECRET)

    monkeypatch.setattr(faulty.service.metrics, "exposition", fail)
    faulty.assert_told(ask(faulty.url, "GET", "/metrics"))


def test_a_simple_chat_fails_in_its_own_form(faulty: Faulty) -> None:
    answer = ask(faulty.url, "POST", "/chat", {"prompt": "a"})
    assert (answer.status, list(answer.json)) == (500, ["error"])
    faulty.assert_hidden(answer.body)
