"""Clients that leave: what they asked for ends at once, whenever they leave and however."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from npu_zoo.testing.serving import RunningServer

from .raw_http import Connection, head, wait_until
from .real_server import LONG, PATH, SHORT, is_idle, metric, paused, running, settle

Leave = Callable[[Connection], None]
LEAVES = pytest.mark.parametrize("leave", [Connection.close, Connection.reset, Connection.half_close])


@pytest.fixture
def server(small_server: RunningServer) -> Iterator[RunningServer]:
    """A server that is idle before and after, and then still answers."""
    wait_until(lambda: is_idle(small_server))
    yield small_server
    settle(small_server)


def aborted(server: RunningServer) -> float:
    return metric(server, "npu_zoo_requests_aborted_total", reason="disconnect")


def begun(server: RunningServer, *, stream: bool, n: int = 1) -> Connection:
    connection = Connection(server.url)
    connection.post(PATH, {**LONG, "stream": stream, "n": n, "temperature": 1 if n > 1 else 0})
    return connection


@LEAVES
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_leaves_while_its_request_runs(server: RunningServer, leave: Leave, stream: bool) -> None:
    before = aborted(server)
    with begun(server, stream=stream, n=2) as connection:
        wait_until(lambda: running(server) == 2)
        if stream:
            next(connection.events())
        leave(connection)
        wait_until(lambda: is_idle(server))
    assert aborted(server) == before + 1


@LEAVES
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_leaves_before_the_first_token(server: RunningServer, leave: Leave, stream: bool) -> None:
    before = aborted(server)
    with paused(server.children["engine"]), begun(server, stream=stream) as connection:
        wait_until(lambda: metric(server, "npu_zoo_requests_in_flight") == 1)
        leave(connection)
        wait_until(lambda: metric(server, "npu_zoo_requests_in_flight") == 0)
    assert aborted(server) == before + 1


@LEAVES
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_leaves_while_its_request_waits(server: RunningServer, leave: Leave, stream: bool) -> None:
    before = aborted(server)
    with begun(server, stream=False, n=2):
        wait_until(lambda: running(server) == 2)
        with begun(server, stream=stream) as connection:
            wait_until(lambda: metric(server, "vllm:num_requests_waiting") == 1)
            leave(connection)
            wait_until(lambda: metric(server, "vllm:num_requests_waiting") == 0)
        assert running(server) == 2
    wait_until(lambda: is_idle(server))
    assert aborted(server) == before + 2


@LEAVES
def test_a_client_leaves_amid_its_body(server: RunningServer, leave: Leave) -> None:
    received = metric(server, "npu_zoo_requests_received_total")
    gone = metric(server, "npu_zoo_http_requests_total", status="499")
    with Connection(server.url) as connection:
        headers = {"Host": connection.host, "Content-Type": "application/json", "Content-Length": "1000"}
        connection.send(head("POST", PATH, headers) + b'{"prompt": "a')
        leave(connection)
        wait_until(lambda: metric(server, "npu_zoo_http_requests_total", status="499") == gone + 1)
    assert metric(server, "npu_zoo_requests_received_total") == received


def test_many_clients_leave_at_once(server: RunningServer) -> None:
    for _ in range(5):
        connections = [begun(server, stream=bool(n % 2)) for n in range(20)]
        for connection in connections:
            connection.reset()
    wait_until(lambda: is_idle(server))


def test_what_a_client_sends_ahead_does_not_hide_that_it_leaves(server: RunningServer) -> None:
    with begun(server, stream=False) as connection:
        wait_until(lambda: running(server) == 1)
        connection.send(b"\r\n")
        connection.post(PATH, SHORT)
        connection.close()
        wait_until(lambda: is_idle(server))
