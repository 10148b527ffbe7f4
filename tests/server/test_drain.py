"""How a server ends: what runs may finish, what is new is refused, and the exit code says how it was."""

from __future__ import annotations

import json
import os
import signal

import psutil
import pytest

from npu_zoo.testing.serving import RunningServer

from .raw_http import Connection, ask, wait_until
from .real_server import GREEDY, PATH, Client, alive, complete, load, metric, paused, start

pytestmark = pytest.mark.slow

SOME = {**GREEDY, "max_tokens": 40}


def processes(server: RunningServer) -> list[int]:
    return [server.pid, *(child.pid for child in psutil.Process(server.pid).children(recursive=True))]


def assert_ended(pids: list[int]) -> None:
    wait_until(lambda: not any(map(alive, pids)))


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 0), pytest.param(signal.SIGINT, 130, marks=pytest.mark.long)]
)
def test_what_runs_finishes_and_what_is_new_is_refused(number: signal.Signals, code: int) -> None:
    with start() as server:
        pids = processes(server)
        expected = complete(server, SOME).texts
        idle = Connection(server.url)
        with paused(server.children["engine"]):
            whole = [Client(server.url, SOME) for _ in range(3)]
            streamed = [Client(server.url, SOME, stream=True) for _ in range(3)]
            wait_until(lambda: metric(server, "npu_zoo_requests_in_flight") == 6)
            server.send_signal(number)
            server.await_status("/health/ready", 503)
            assert server.get("/health/ready")[1] == {"status": "draining"}
            assert server.get("/health/live")[0] == 200
            with idle:  # a connection from before; others are taken too, so that they are told
                idle.post(PATH, SOME)
                refused = [idle.answer(), complete(server, SOME), ask(server.url, "POST", "/chat", {"prompt": "a"})]
            assert [answer.status for answer in refused] == [503] * 3
            assert [answer.error["code"] for answer in refused[:2]] == ["draining"] * 2
            assert "ending" in refused[2].json["error"]
            assert all(int(answer.headers["Retry-After"]) >= 1 for answer in refused)
            assert metric(server, "npu_zoo_requests_rejected_total", reason="draining") == 3
        for client in whole:
            answer = client.ended().answer
            assert answer is not None
            assert (answer.status, answer.texts) == (200, expected)
        for client in streamed:
            *events, last = client.ended().events
            parts = [json.loads(event)["choices"][0]["text"] for event in events]
            assert (last, ["".join(parts)]) == ("[DONE]", expected)
        assert server.wait() == code
        assert_ended(pids)
        with pytest.raises(ConnectionRefusedError):
            Connection(server.url)


@pytest.mark.parametrize(
    ("grace", "number", "code"),
    [pytest.param("0", signal.SIGTERM, 0, marks=pytest.mark.long), ("0.3", signal.SIGINT, 130)],
)
def test_what_runs_beyond_the_grace_period_gets_an_error_and_an_end(
    grace: str, number: signal.Signals, code: int
) -> None:
    with start("--grace", grace) as server:
        pids = processes(server)
        whole, streamed = load(server)
        silent = Connection(server.url)
        server.send_signal(number)
        for client in whole:
            answer = client.ended().answer
            assert answer is not None
            assert (answer.status, answer.error["code"]) == (503, "draining")
        for client in streamed:
            assert client.ended().broken is None
            assert json.loads(client.events[-1])["error"]["code"] == "draining"
        with silent:
            assert silent.closed()
        assert server.wait() == code
        assert_ended(pids)


def test_a_second_interrupt_ends_all_at_once() -> None:
    """A terminal sends it to the whole group of processes, of which the supervisor alone is to hear it."""
    with start() as server:
        pids, group = processes(server), os.getpgid(server.pid)
        assert group != os.getpgrp()
        clients = [*load(server)[0]]
        with paused(server.children["engine"]):
            os.killpg(group, signal.SIGINT)
            server.await_status("/health/ready", 503)
            os.killpg(group, signal.SIGINT)
            assert server.wait() == 130
        assert all(client.ended().broken is not None for client in clients)
        assert_ended(pids)


def test_requests_that_wait_for_their_turn_finish_too() -> None:
    with start(sequences=1) as server:
        with paused(server.children["engine"]):
            clients = [Client(server.url, {**SOME, "max_tokens": 60}) for _ in range(6)]
            wait_until(lambda: metric(server, "npu_zoo_requests_in_flight") == 6)
            server.send_signal(signal.SIGTERM)
            server.await_status("/health/ready", 503)
        answers = [client.ended().answer for client in clients]
        assert [answer and answer.status for answer in answers] == [200] * 6
        assert server.wait() == 0
