"""Levels of load against a server that does what the test says."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import os
import resource
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from npu_zoo.core.errors import ConfigError
from npu_zoo.evaluation.serving import stream
from npu_zoo.evaluation.serving.arrivals import ClosedLoop, Load, OpenLoop
from npu_zoo.evaluation.serving.client import Client, raise_file_limit
from npu_zoo.evaluation.serving.figures import LevelFigures
from npu_zoo.evaluation.serving.load import Level, LevelRun, run_level
from npu_zoo.evaluation.serving.observation import Observation
from npu_zoo.evaluation.serving.requests import RequestForm
from npu_zoo.evaluation.serving.work import Ask
from npu_zoo.protocol.server_address import ServerAddress

from .stub_server import Handler, Reply, Stub, completion, status, token, usage

FORM = RequestForm("completions", "stub")
ASK = Ask([1, 2, 3], max_tokens=4, asked_prompt_tokens=3)


def run(
    url: str, load: Load, count: int | None = 3, *, duration: float | None = None, timeout: float = 30.0, **options: Any
) -> LevelRun:
    async def level() -> LevelRun:
        address = ServerAddress.parse(url, "--url")
        async with Client(address, "key", timeout=timeout) as client:
            asks: Iterator[Ask] = itertools.repeat(ASK)
            return await run_level(client, Level(load, count, duration), FORM, asks, **options)

    return asyncio.run(asyncio.wait_for(level(), 60))


def one(handler: Handler, **options: Any) -> Observation:
    with Stub(completions=handler) as stub:
        (seen,) = run(stub.url, ClosedLoop(1), 1, **options).observations
    return seen


def failure_of(handler: Handler, **options: Any) -> tuple[str, str]:
    seen = one(handler, **options)
    assert seen.status == "failed"
    assert seen.failure is not None
    return seen.failure.kind, seen.failure.message


def test_delays_and_tokens_are_those_of_the_server() -> None:
    delays = [0.08, 0.02, 0.02, 0.02]
    seen = one(completion(delays))
    assert seen.status == "completed"
    assert (seen.prompt_tokens, seen.output_tokens, seen.counted_by_server) == (3, 4, True)
    assert seen.characters == (2, 2, 2, 2)
    assert seen.ttft is not None
    assert seen.e2e is not None
    assert seen.ttft >= 0.08
    assert seen.e2e >= sum(delays)
    assert len(seen.itl) == 3


def test_requests_say_what_is_measured_and_carry_the_key() -> None:
    with Stub(completions=completion()) as stub:
        run(stub.url, ClosedLoop(1), 1)
    (body,) = stub.generations()
    assert body == {
        "model": "stub",
        "prompt": [1, 2, 3],
        "max_tokens": 4,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    assert stub.keys == ["Bearer key"]


def test_a_key_that_cannot_stand_in_a_header_is_refused() -> None:
    with pytest.raises(ConfigError, match="API key"):
        Client(ServerAddress.parse("localhost:1", "--url"), "a\nb")


def test_events_are_counted_where_the_server_counts_nothing() -> None:
    seen = one(completion(with_usage=False))
    assert (seen.output_tokens, seen.prompt_tokens, seen.counted_by_server) == (4, None, False)


@pytest.mark.parametrize("chunked", [False, True])
def test_a_server_that_closes_mid_stream_has_failed(chunked: bool) -> None:
    async def handle(reply: Reply) -> None:
        await reply.begin_stream(chunked=chunked)
        text = f"data: {json.dumps(token())}\n\n"
        await reply.raw(f"{len(text):x}\r\n{text}\r\n".encode() if chunked else text.encode())

    seen = one(handle)
    assert seen.status == "failed"
    assert seen.failure is not None
    assert seen.failure.kind == "closed"
    assert len(seen.arrivals) == 1


def test_failures_stay_in_the_figures_beside_what_completed() -> None:
    answers = itertools.cycle(
        [completion(), status(429, "Too Many Requests", {"error": {"message": "slow down"}}), completion()]
    )

    async def handle(reply: Reply) -> None:
        await next(answers)(reply)

    with Stub(completions=handle) as stub:
        figures = LevelFigures.of(run(stub.url, ClosedLoop(1), 6).observations)
    assert (figures.sent, figures.completed, figures.failed) == (6, 4, 2)
    (failure,) = figures.failures
    assert (failure.kind, failure.message, failure.count) == ("status", "HTTP 429 Too Many Requests: slow down", 2)
    assert len(stub.generations()) == 6


@pytest.mark.parametrize(
    ("code", "data", "said"),
    [
        (500, {"error": {"message": "it broke"}}, "HTTP 500 Reason: it broke"),
        (503, {"detail": "loading"}, "HTTP 503 Reason: loading"),
        (404, "", "HTTP 404 Reason"),
        (307, {}, "HTTP 307 Reason"),
    ],
)
def test_a_status_is_told_with_what_the_server_says(code: int, data: Any, said: str) -> None:
    assert failure_of(status(code, "Reason", data)) == ("status", said)


def test_an_answer_that_is_no_stream_is_malformed() -> None:
    kind, message = failure_of(status(200, "OK", {"choices": [{"text": "whole"}]}))
    assert kind == "malformed"
    assert "application/json" in message


def test_what_is_no_json_is_malformed() -> None:
    async def handle(reply: Reply) -> None:
        await reply.begin_stream()
        await reply.event(token())
        await reply.event("{")
        await reply.event("[DONE]")

    assert failure_of(handle)[0] == "malformed"


def test_what_is_no_http_is_malformed() -> None:
    async def handle(reply: Reply) -> None:
        await reply.raw(b"220 ready for mail\r\n\r\n")

    assert failure_of(handle)[0] == "malformed"


def test_a_server_that_closes_before_it_answers() -> None:
    async def handle(reply: Reply) -> None:
        pass

    assert failure_of(handle)[0] == "closed"


@pytest.mark.parametrize("begun", [False, True])
def test_a_request_that_takes_too_long(begun: bool) -> None:
    async def handle(reply: Reply) -> None:
        if begun:
            await reply.begin_stream()
            await reply.event(token())
        await asyncio.sleep(60)

    kind, message = failure_of(handle, timeout=0.2)
    assert kind == "time-out"
    assert ("did not end" in message) == begun


def test_an_answer_that_the_server_gives_up_has_failed() -> None:
    async def handle(reply: Reply) -> None:
        await reply.begin_stream()
        await reply.event(token(finish="abort"))
        await reply.event("[DONE]")

    assert failure_of(handle)[0] == "error"


def test_what_comes_after_a_whole_answer_does_not_matter() -> None:
    async def handle(reply: Reply) -> None:
        await reply.begin_stream(chunked=True)
        text = f"data: {json.dumps(token(finish='stop'))}\n\n"
        await reply.raw(f"{len(text):x}\r\n{text}\r\n".encode())

    assert one(handle).status == "completed"


def test_nobody_listens() -> None:
    with Stub() as stub:
        url = stub.url
    run_level = run(url, OpenLoop(1000.0), 3)
    assert [seen.failure and seen.failure.kind for seen in run_level.observations] == ["refused"] * 3


def test_an_open_loop_does_not_wait_for_answers() -> None:
    released = asyncio.Event()

    async def handle(reply: Reply) -> None:
        if len(stub.generations()) == 8:
            released.set()
        await released.wait()
        await completion()(reply)

    with Stub(completions=handle) as stub:
        observations = run(stub.url, OpenLoop(200.0), 8).observations
    assert stub.most == 8
    assert [seen.status for seen in observations] == ["completed"] * 8
    assert all(seen.lateness is not None and seen.lateness >= 0 for seen in observations)
    assert [seen.due for seen in observations] == sorted(seen.due or 0 for seen in observations)


def test_a_slow_client_is_told_by_its_lateness(monkeypatch: pytest.MonkeyPatch) -> None:
    encode = RequestForm.encode

    def slowly(form: RequestForm, ask: Ask) -> bytes:
        time.sleep(0.05)
        return encode(form, ask)

    monkeypatch.setattr(RequestForm, "encode", slowly)
    with Stub(completions=completion()) as stub:
        figures = LevelFigures.of(run(stub.url, OpenLoop(1000.0), 5).observations)
    assert figures.lateness is not None
    assert figures.lateness.p99 > 150


def test_a_closed_loop_has_so_many_under_way_and_no_more() -> None:
    async def handle(reply: Reply) -> None:
        await asyncio.sleep(0.01)
        await completion()(reply)

    with Stub(completions=handle) as stub:
        observations = run(stub.url, ClosedLoop(3), 10).observations
    assert stub.most == 3
    assert LevelFigures.of(observations).peak_concurrency == 3
    assert [seen.index for seen in observations] == list(range(10))
    assert {seen.lateness for seen in observations} == {None}


def test_a_duration_ends_a_load_that_is_due_at_once() -> None:
    ran = run("http://127.0.0.1:1", OpenLoop(math.inf), None, duration=0.05)
    assert ran.observations
    assert not ran.interrupted


def test_this_client_s_limit_of_open_files_is_not_the_server_s_failure() -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)

    async def level() -> LevelRun:
        async with Client(ServerAddress.parse("http://127.0.0.1:1", "--url")) as client:
            os.close(free := os.dup(0))
            resource.setrlimit(resource.RLIMIT_NOFILE, (free, limits[1]))
            return await run_level(client, Level(ClosedLoop(1), 1), FORM, itertools.repeat(ASK))

    try:
        (seen,) = asyncio.run(level()).observations
        raise_file_limit()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (limits[1], limits[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert seen.failure is not None
    assert seen.failure.kind == "client"
    assert "too many open files" in seen.failure.message


@pytest.mark.parametrize("load", [ClosedLoop(2), OpenLoop(100.0)])
def test_a_duration_ends_the_sending_and_waits_for_what_runs(load: Load) -> None:
    with Stub(completions=completion([0.02])) as stub:
        ran = run(stub.url, load, None, duration=0.2)
    assert ran.observations
    assert {seen.status for seen in ran.observations} == {"completed"}
    assert max(seen.due or 0 for seen in ran.observations) < 0.2
    assert not ran.interrupted


def test_being_stopped_keeps_what_there_is_and_blames_nobody() -> None:
    stops: list[Callable[[], object]] = []

    async def handle(reply: Reply) -> None:
        if len(stub.generations()) <= 2:
            await completion()(reply)
            return
        await reply.begin_stream()
        await reply.event(token())
        if len(stub.generations()) == 4:
            stops[0]()
        await asyncio.sleep(60)

    async def stopped() -> LevelRun:
        stop, loop = asyncio.Event(), asyncio.get_running_loop()
        stops.append(lambda: loop.call_soon_threadsafe(stop.set))
        async with Client(ServerAddress.parse(stub.url, "--url")) as client:
            return await run_level(client, Level(ClosedLoop(2), 100), FORM, itertools.repeat(ASK), stop=stop)

    with Stub(completions=handle) as stub:
        ran = asyncio.run(stopped())
    assert ran.interrupted
    assert sorted(seen.status for seen in ran.observations) == ["cancelled"] * 2 + ["completed"] * 2
    assert LevelFigures.of(ran.observations).failed == 0


def test_nothing_is_read_of_an_answer_while_it_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(reader: object, chunk: bytes) -> Iterator[str]:
        raise AssertionError("it is read")

    async def exchange() -> int:
        async with Client(ServerAddress.parse(stub.url, "--url")) as client:
            done = await client.exchange("/completions", FORM.encode(ASK), time.monotonic)
            assert done.failure is None
            return sum(len(piece.data) for piece in done.pieces)

    monkeypatch.setattr(stream.EventReader, "feed", refuse)
    with Stub(completions=completion()) as stub:
        assert asyncio.run(exchange()) > 100


def test_the_server_s_last_count_is_the_one_that_counts() -> None:
    async def handle(reply: Reply) -> None:
        await reply.begin_stream()
        await reply.event({**token("a"), "usage": {"prompt_tokens": 3, "completion_tokens": 1}})
        await reply.event(token("bcd", "stop"))
        await reply.event(usage(3, 5))

    seen = one(handle)
    assert (seen.status, seen.output_tokens) == ("completed", 5)
