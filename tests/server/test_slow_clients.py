"""Clients that take their time, or send more than they may: the others notice nothing of them."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator

import psutil
import pytest

from npu_zoo.testing.serving import RunningServer

from .raw_http import Connection, ask, head, wait_until
from .real_server import MODEL, PATH, SHORT, complete, is_idle, metric, paused, settle

pytestmark = pytest.mark.slow

MOST_BODY = 4 * 2**20
LARGE = 100 * 2**20


@pytest.fixture
def server(small_server: RunningServer) -> Iterator[RunningServer]:
    """A server that is idle before and after, and then still answers."""
    wait_until(lambda: is_idle(small_server))
    yield small_server
    settle(small_server)


def body_head(connection: Connection, **headers: str) -> bytes:
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    return head("POST", PATH, {"Host": connection.host, "Content-Type": "application/json", **given})


def memory(server: RunningServer) -> float:
    return psutil.Process(server.children["front end"]).memory_info().rss / 2**20


def test_a_slow_body_is_answered(server: RunningServer) -> None:
    with Connection(server.url) as connection:
        connection.send(body_head(connection, Content_Length="1000") + b'{"prompt"')
        answer = connection.answer()
        assert answer.status == 408
        assert "1 s" in answer.error["message"]


def test_many_idle_connections_keep_nobody_waiting(server: RunningServer) -> None:
    with contextlib.ExitStack() as stack:
        connections = [stack.enter_context(Connection(server.url)) for _ in range(500)]
        assert complete(server).status == 200
        for connection in connections[::50]:
            connection.ask("GET", "/health/live")
            assert connection.answer("GET").status == 200


def test_a_reader_that_reads_nothing_holds_up_nobody(server: RunningServer) -> None:
    """Its answer is larger than what the system keeps for it; it costs that for a while, and none of the places."""
    front_end = psutil.Process(server.children["front end"])
    files, sent = front_end.num_fds(), metric(server, "npu_zoo_http_requests_total", route=PATH)
    prompt = "def f(x): return x + 1\n" * 180
    body = {"model": MODEL, "prompt": [prompt] * 14, "echo": True, "logprobs": 5, "max_tokens": 1, "stream": True}
    with Connection(server.url, read_size=4096) as connection:
        connection.post(PATH, body)
        wait_until(lambda: metric(server, "npu_zoo_requests_in_flight") > 0)
        # They finish before it is given up, or, where the machine is busy, are called off with it.
        wait_until(lambda: metric(server, "npu_zoo_requests_in_flight") == 0)
        others = [Connection(server.url) for _ in range(14)]
        with paused(server.children["engine"]):
            for other in others:
                other.post(PATH, SHORT)
            wait_until(lambda: metric(server, "npu_zoo_requests_in_flight") == 14)
        for other in others:
            with other:
                assert other.answer().status == 200
        # It is given up.
        wait_until(lambda: metric(server, "npu_zoo_http_requests_total", route=PATH) == sent + 15)
        wait_until(lambda: front_end.num_fds() <= files)


def test_a_large_body_is_refused_by_its_declared_size(server: RunningServer) -> None:
    before = memory(server)
    with Connection(server.url) as connection:
        connection.send(body_head(connection, Content_Length=str(LARGE)))
        for _ in range(LARGE // 2**20):
            connection.send(bytes(2**20))
        answer = connection.answer()
        assert answer.status == 413
        assert str(LARGE) in answer.error["message"]
        assert str(MOST_BODY) in answer.error["message"]
        connection.ask("GET", "/health/live")
        assert connection.answer("GET").status == 200
    assert memory(server) - before < 32


def test_a_large_body_of_undeclared_size_is_refused(server: RunningServer) -> None:
    before = memory(server)
    with Connection(server.url) as connection:
        connection.send(body_head(connection, Transfer_Encoding="chunked"))
        for _ in range(LARGE // 2**20):
            connection.send(b"100000\r\n" + bytes(2**20) + b"\r\n")
        connection.send(b"0\r\n\r\n")
        answer = connection.answer()
        assert answer.status == 413
        assert str(MOST_BODY) in answer.error["message"]
    assert memory(server) - before < 32


def test_who_declares_a_large_body_and_waits_is_told_before_sending_it(server: RunningServer) -> None:
    with Connection(server.url) as connection:
        connection.send(body_head(connection, Content_Length=str(LARGE), Expect="100-continue"))
        assert connection.answer().status == 413


def test_a_chunked_body_is_read(server: RunningServer) -> None:
    whole = complete(server).texts
    with Connection(server.url) as connection:
        connection.ask("POST", PATH, headers={"Content-Type": "application/json", "Transfer-Encoding": "chunked"})
        text = json.dumps(SHORT).encode()
        for start in range(0, len(text), 7):
            part = text[start : start + 7]
            connection.send(b"%x\r\n%b\r\n" % (len(part), part))
        connection.send(b"0\r\n\r\n")
        assert connection.answer().texts == whole


def test_an_old_client_is_served(server: RunningServer) -> None:
    """HTTP/1.0 without a Host header, whole and streamed; the end of the connection is that of the stream."""
    whole = complete(server).texts
    for stream in (False, True):
        with Connection(server.url) as connection:
            body = json.dumps({**SHORT, "stream": stream}).encode()
            connection.ask("POST", PATH, body, {"Host": None}, version="1.0")
            if stream:
                assert list(connection.events())[-1] == "[DONE]"
            else:
                assert connection.answer().texts == whole
            assert connection.closed()


def test_requests_sent_ahead_are_answered_in_their_order(server: RunningServer) -> None:
    with Connection(server.url) as connection:
        for count in range(1, 9):
            connection.post(PATH, {**SHORT, "max_tokens": count})
        counts = [connection.answer().json["usage"]["completion_tokens"] for _ in range(8)]
        assert counts == list(range(1, 9))


def test_connections_cut_anywhere_leave_nothing(server: RunningServer) -> None:
    with Connection(server.url) as connection:
        text = body_head(connection, Content_Length="30") + b'{"model": "deepseek_coder", "pr'
    for length in range(0, len(text), 3):
        with Connection(server.url) as connection:
            connection.send(text[:length])
            if length % 2:
                connection.reset()
    assert "Traceback" not in server.log
    assert ask(server.url, "GET", "/health/ready").status == 200


def test_a_head_may_be_long_but_not_endless(server: RunningServer) -> None:
    with Connection(server.url) as connection:
        connection.ask("GET", "/version", headers={"X-Token": "a" * 60_000})
        assert connection.answer("GET").status == 200
        connection.ask("GET", "/version", headers={"X-Token": "a" * 2_000_000})
        assert connection.answer("GET").status == 431
