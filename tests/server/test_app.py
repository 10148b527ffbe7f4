"""The application in this process, with an engine that does as a test says."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import httpx2 as httpx
import pytest

from npu_zoo.core.config import EngineConfig
from npu_zoo.core.engine import FinishReason, GenerationRequest, RequestOutput
from npu_zoo.server.app import create_app
from npu_zoo.server.messages import initial_output
from npu_zoo.server.options import ServeOptions
from npu_zoo.server.service import Service

from .conftest import demo_config

PATH = "/v1/completions"
BODY = {"prompt": "def add(a, b):", "model": "deepseek_coder", "max_tokens": 1}
JSON = {"Content-Type": "application/json"}


class StandInClient:
    """In place of the engine's client: answers at once, or as soon as it may."""

    ready = True
    info = None

    def __init__(self) -> None:
        self.requests: list[GenerationRequest] = []
        self.go = asyncio.Event()
        self.go.set()
        self.reason: FinishReason = "stop"

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[RequestOutput, None]:
        self.requests.append(request)
        await self.go.wait()
        output = initial_output(request)
        output.finished = True
        for completion in output.outputs:
            completion.finish_reason = self.reason
        yield output


class App:
    """An application and a client of it."""

    def __init__(self, config: EngineConfig, **options: Any) -> None:
        self.engine = StandInClient()
        self.service = Service(config, ServeOptions(**options), self.engine)  # type: ignore[arg-type]
        transport = httpx.ASGITransport(create_app(self.service))
        self.http = httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1")

    async def post(self, path: str = PATH, **fields: Any) -> httpx.Response:
        return await self.http.post(path, json={**BODY, **fields})

    def count(self, name: str, **labels: str) -> float:
        body = self.service.metrics.exposition()[0].decode()
        wanted = [f'{key}="{value}"' for key, value in labels.items()]
        lines = [line for line in body.splitlines() if line.startswith(f"{name}{{")]
        return sum(float(line.rpartition(" ")[2]) for line in lines if all(want in line for want in wanted))


@contextlib.asynccontextmanager
async def serving(config: EngineConfig, **options: Any) -> AsyncIterator[App]:
    app = App(config, **options)
    try:
        async with app.http:
            yield app
    finally:
        app.service.readers.close()


async def until(condition: Any) -> None:
    while not condition():
        await asyncio.sleep(0.005)


class SlowBody:
    """A body whose end comes when a test says so."""

    def __init__(self, data: bytes) -> None:
        self.data, self.begun, self.end = data, asyncio.Event(), asyncio.Event()

    async def parts(self) -> AsyncIterator[bytes]:
        self.begun.set()
        yield self.data[:-1]
        await self.end.wait()
        yield self.data[-1:]


def test_a_request_takes_its_place_before_its_body_is_read() -> None:
    async def run() -> None:
        slow, unread = SlowBody(json.dumps(BODY).encode()), SlowBody(b"{}")
        config_of_one = demo_config(max_num_seqs=1)
        async with serving(config_of_one, max_queue=0) as app:
            first = asyncio.create_task(app.http.post(PATH, content=slow.parts(), headers=JSON))
            await slow.begun.wait()
            refused = await app.http.post(PATH, content=unread.parts(), headers=JSON)
            assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
            assert not unread.begun.is_set()
            slow.end.set()
            assert (await first).status_code == 200
            assert (await app.post()).status_code == 200
            assert app.service.queue.preparing == app.service.queue.admitted == 0

    asyncio.run(run())


def test_the_bytes_of_all_bodies_are_bounded(config: EngineConfig) -> None:
    async def run() -> None:
        body = json.dumps({**BODY, "prompt": "a" * 900}).encode()
        async with serving(config, max_body_size=1024, max_queue=64) as app:
            held = [SlowBody(body) for _ in range(16 * 1024 // len(body))]
            posts = [asyncio.create_task(app.http.post(PATH, content=one.parts(), headers=JSON)) for one in held]
            await until(lambda: app.service.bodies.taken >= len(held) * (len(body) - 1))
            refused = await app.http.post(PATH, content=body, headers=JSON)
            assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
            for one in held:
                one.end.set()
            assert {answer.status_code for answer in await asyncio.gather(*posts)} == {200}
            assert app.service.bodies.taken == 0

    asyncio.run(run())


def test_a_failure_on_the_way_to_the_engine_leaves_the_queue_as_it_was(
    config: EngineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run() -> None:
        async with serving(config) as app:
            monkeypatch.setattr(app.service.tracing, "started", None)
            assert (await app.post()).status_code == 500
            assert app.service.queue.admitted == 0

    asyncio.run(run())


def test_only_requests_that_finished_tell_how_long_others_take(config: EngineConfig) -> None:
    async def run() -> None:
        async with serving(config) as app:
            before = app.service.queue.seconds
            app.engine.reason = "abort"
            await app.post()
            assert app.service.queue.seconds == before
            app.engine.reason = "length"
            await app.post()
            assert app.service.queue.seconds < before

    asyncio.run(run())
