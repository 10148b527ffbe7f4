"""Processes of a server are killed amid load, and its clients see no more of it than they must."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator

import psutil
import pytest

from npu_zoo.testing.serving import RunningServer

from .raw_http import Answer, Connection, ask, wait_until
from .real_server import GREEDY, PATH, SHORT, SMALL, alive, complete, is_idle, load, metric, paused, start

BODIES = [{**GREEDY, "prompt": f"def f{n}(", "max_tokens": 8 + 4 * n} for n in range(4)]


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with start() as server:
        yield server


def texts(server: RunningServer) -> list[list[str]]:
    return [complete(server, body).texts for body in BODIES]


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


def refuses(server: RunningServer) -> bool:
    try:
        Connection(server.url).close()
    except ConnectionRefusedError:
        return True
    return False


def assert_lost(answer: Answer | None) -> None:
    assert answer is not None
    assert answer.status == 503
    assert answer.error["code"] == "engine_lost"
    assert int(answer.headers["Retry-After"]) >= 1


@pytest.mark.slow
def test_the_engine_is_killed_under_load(server: RunningServer) -> None:
    before, front_end, engine = texts(server), server.children["front end"], server.children["engine"]
    whole, streamed = load(server)
    kill(engine)
    for client in whole:
        assert_lost(client.ended().answer)
    for client in streamed:
        *events, last = client.ended().events
        assert client.broken is None
        assert all(json.loads(event)["choices"] for event in events)
        assert json.loads(last)["error"]["code"] == "engine_lost"
    server.await_status("/health/ready", 503)
    assert server.get("/health/live") == (200, {"status": "ok"})
    assert server.get("/health/ready")[1] == {"status": "starting"}
    meanwhile = complete(server)
    assert (meanwhile.status, meanwhile.error["code"]) == (503, "engine_not_ready")
    assert int(meanwhile.headers["Retry-After"]) >= 1
    server.await_status("/health/ready", 200)
    assert texts(server) == before
    assert server.children["front end"] == front_end
    assert server.children["engine"] != engine
    assert metric(server, "npu_zoo_engine_restarts_total") == 1
    assert metric(server, "npu_zoo_requests_failed_total", reason="engine_died") == 6
    assert metric(server, "npu_zoo_requests_rejected_total", reason="engine_down") == 1
    assert is_idle(server)


@pytest.mark.slow
def test_the_front_end_is_killed_under_load(server: RunningServer) -> None:
    before, front_end, engine = texts(server), server.children["front end"], server.children["engine"]
    whole, streamed = load(server)
    with paused(server.pid):  # so that the connections come before the next front end
        kill(front_end)
        for client in [*whole, *streamed]:
            assert client.ended().broken is not None
        connections = [Connection(server.url) for _ in range(50)]
        for connection in connections:
            connection.post(PATH, SHORT)
    answers = []
    for connection in connections:
        with connection:
            answers.append(connection.answer())
    assert [answer.status for answer in answers] == [200] * 50
    assert server.children["engine"] == engine
    assert server.children["front end"] != front_end
    assert texts(server) == before
    wait_until(lambda: is_idle(server))
    # What a front end counts begins again with it.
    assert metric(server, "npu_zoo_requests_received_total") == len(answers) + len(BODIES)
    assert metric(server, "npu_zoo_engine_restarts_total") == 0


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.long), 2])
def test_the_supervisor_is_killed_under_load(ranks: int) -> None:
    with start("--tp", str(ranks)) as server:
        processes = psutil.Process(server.pid).children(recursive=True)
        assert len(processes) >= 1 + ranks
        whole, streamed = load(server)
        kill(server.pid)
        wait_until(lambda: not any(alive(process.pid) for process in processes))
        assert all(client.ended().broken is not None for client in [*whole, *streamed])
        wait_until(lambda: refuses(server))  # what was started meanwhile ends a moment later


@pytest.mark.slow
def test_a_server_outlives_who_reads_its_log() -> None:
    """Such as `npu-zoo serve 2>&1 | head`: what it has to say then goes nowhere, and ends nothing."""
    arguments = [*SMALL, "--port", "0"]
    with subprocess.Popen([sys.executable, "-m", "npu_zoo", "serve", *arguments], stderr=subprocess.PIPE) as process:
        try:
            assert process.stderr
            lines = iter(process.stderr.readline, b"")
            url = next(found[1] for line in lines if (found := re.search(r"is served at (\S+)/v1", line.decode())))
            process.stderr.close()
            engine = next(child for child in psutil.Process(process.pid).children() if "engine" in child.cmdline())
            wait_until(lambda: ask(url, "GET", "/health/ready").status == 200)
            engine.kill()
            wait_until(lambda: ask(url, "GET", "/health/ready").status == 503)
            wait_until(lambda: ask(url, "GET", "/health/ready").status == 200)
            assert ask(url, "GET", "/nowhere").status == 404
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
        finally:
            process.kill()
