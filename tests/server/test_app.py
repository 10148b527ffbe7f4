"""The application in this process, with an engine that does as a test says."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import httpx2 as httpx
import pytest
import uvicorn

from npu_zoo.core.config import EngineConfig
from npu_zoo.core.engine import FinishReason, GenerationRequest, RequestOutput
from npu_zoo.server.app import create_app
from npu_zoo.server.client import ClientClosed
from npu_zoo.server.front_end import uvicorn_config
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
        self.error: Exception | None = None

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[RequestOutput, None]:
        self.requests.append(request)
        await self.go.wait()
        if self.error is not None:
            raise self.error
        output = initial_output(request)
        output.finished = True
        for completion in output.outputs:
            completion.finish_reason = self.reason
        yield output


class App:
    """An application and a client of it."""

    def __init__(self, config: EngineConfig, *, draw_seeds: bool = True, **options: Any) -> None:
        self.engine, given = StandInClient(), ServeOptions(**options)
        self.service = Service(config, given, self.engine, draw_seeds=draw_seeds)  # type: ignore[arg-type]
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
async def serving(config: EngineConfig, *, draw_seeds: bool = True, **options: Any) -> AsyncIterator[App]:
    app = App(config, draw_seeds=draw_seeds, **options)
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


async def seeds(config: EngineConfig, *, draw_seeds: bool = True) -> list[int | None]:
    """Of two prompts of one request, another one, and one that names its own."""
    async with serving(config, draw_seeds=draw_seeds) as app:
        assert (await app.post(prompt=["a", "a"])).status_code == 200
        assert (await app.post(prompt="a")).status_code == 200
        assert (await app.post(prompt="a", seed=5)).status_code == 200
        return [request.sampling_params.seed for request in app.engine.requests]


def test_requests_without_a_seed_get_one_each(config: EngineConfig) -> None:
    *drawn, own = asyncio.run(seeds(config))
    assert own == 5
    assert len(set(drawn)) == 3
    assert all(seed is not None and 0 <= seed < 2**63 for seed in drawn)


def test_a_seed_of_the_engine_holds_for_requests_without_one(config: EngineConfig) -> None:
    assert asyncio.run(seeds(config, draw_seeds=False)) == [None, None, None, 5]


def test_an_output_that_could_not_keep_its_form_has_failed(config: EngineConfig) -> None:
    async def run() -> None:
        async with serving(config) as app:
            app.engine.reason = "error"
            refused = await app.post()
            assert (refused.status_code, refused.json()["error"]["code"]) == (400, "output_failed")
            assert app.count("request_success_total") == app.count("npu_zoo_requests_in_flight") == 0
            assert app.count("npu_zoo_requests_failed_total", reason="form") == 1
            assert app.count("vllm:request_success_total", finished_reason="error") == 1

    asyncio.run(run())


def test_a_request_that_the_server_s_end_cuts_is_called_off(config: EngineConfig) -> None:
    async def run() -> None:
        async with serving(config) as app:
            app.engine.error = ClientClosed("the server ended")
            cut = await app.post()
            assert (cut.status_code, cut.json()["error"]["code"]) == (503, "draining")
            assert app.count("npu_zoo_requests_aborted_total", reason="shutdown") == 1
            assert app.count("npu_zoo_requests_failed_total") == 0

    asyncio.run(run())


@pytest.mark.parametrize(
    ("least", "asked", "status"), [(0, 0, 200), (0, None, 200), (0, -1, 400), (-3, -3, 200), (-3, -4, 400)]
)
def test_requests_are_no_more_urgent_than_they_may_be(
    config: EngineConfig, least: int, asked: int | None, status: int
) -> None:
    async def run() -> None:
        async with serving(config, min_priority=least) as app:
            answer = await app.post(priority=asked)
            assert answer.status_code == status
            if status == 400:
                error = answer.json()["error"]
                assert error["param"] == "priority"
                assert f"{asked}, and requests may ask for {least} and more" in error["message"]

    asyncio.run(run())


def test_the_log_names_an_answer_as_it_names_itself(config: EngineConfig, caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> None:
        async with serving(config) as app:
            with caplog.at_level("INFO", logger="npu_zoo.server"):
                answer = await app.post()
            (found,) = [record for record in caplog.records if getattr(record, "event", None) == "request"]
            assert vars(found)["fields"]["answer_id"] == answer.json()["id"]

    asyncio.run(run())


async def whoami(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": scope["client"][0].encode()})


@pytest.mark.parametrize(
    ("trusted", "client"), [((), "127.0.0.1"), (("127.0.0.0/8",), "192.0.2.7"), (("192.0.2.1",), "127.0.0.1")]
)
def test_a_client_s_address_is_what_a_trusted_proxy_says_alone(trusted: tuple[str, ...], client: str) -> None:
    async def run() -> str:
        server = uvicorn.Server(uvicorn_config(whoami, ServeOptions(forwarded_allow_ips=trusted)))
        with socket.create_server(("127.0.0.1", 0)) as listener:
            serving = asyncio.create_task(server.serve([listener]))
            async with httpx.AsyncClient(trust_env=False) as http:
                url = f"http://127.0.0.1:{listener.getsockname()[1]}/"
                answer = await http.get(url, headers={"X-Forwarded-For": "192.0.2.7"})
            server.should_exit = True
            await serving
            return answer.text

    assert asyncio.run(run()) == client
