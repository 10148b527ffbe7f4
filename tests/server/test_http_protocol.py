"""What a connection may be kept waiting for: raw sockets against the protocol with an application of a few lines."""

from __future__ import annotations

import http.client
import time
from collections.abc import Iterator
from typing import Any

import pytest

from .protocol_server import HUGE, LARGE, Application, served
from .raw_http import Connection, head, wait_until


@pytest.fixture(scope="module")
def application() -> Application:
    return Application()


@pytest.fixture(scope="module")
def url(application: Application) -> Iterator[str]:
    """A server that waits for as long as a test may take."""
    with served(application) as url:
        yield url


@pytest.fixture(scope="module")
def hurried() -> Iterator[str]:
    """A server that waits for half a second."""
    with served(Application(), head_timeout=0.5, send_timeout=0.5) as url:
        yield url


def send_until_cut(connection: Connection, data: bytes) -> None:
    """A byte now and then, until the server no longer takes any."""
    with pytest.raises(ConnectionError):
        keep_sending(connection, data)


def send_often(connection: Connection, data: bytes, times: int) -> None:
    for _ in range(times):
        connection.send(data)


def keep_sending(connection: Connection, data: bytes) -> None:
    while True:
        connection.send(data)
        time.sleep(0.02)


@pytest.mark.parametrize("begun", [b"", b"G", b"GET / HTTP/1.1\r\nHost: a\r\n"])
def test_a_head_that_does_not_come_is_given_up(hurried: str, begun: bytes) -> None:
    with Connection(hurried) as connection:
        connection.send(begun)
        answer = connection.answer()
        assert answer.status == 408
        assert "0.5 s" in answer.error["message"]
        assert connection.closed()


def test_a_byte_now_and_then_does_not_prolong_it(hurried: str) -> None:
    with Connection(hurried) as connection:
        send_until_cut(connection, b"G")


def test_the_next_head_of_a_connection_is_given_up_too(hurried: str) -> None:
    with Connection(hurried) as connection:
        connection.ask("GET", "/")
        assert connection.answer("GET").body == b"ok"
        connection.send(b"GET /")
        assert connection.answer().status == 408
        assert connection.closed()


def test_a_connection_between_requests_is_kept(hurried: str) -> None:
    with Connection(hurried) as connection:
        for _ in range(3):
            connection.ask("POST", "/", b"a body")
            assert connection.answer().body == b"a body"
            time.sleep(0.8)
        assert connection.open_and_silent()


def test_the_rest_of_a_body_nobody_waits_for_is_given_up(hurried: str) -> None:
    with Connection(hurried) as connection:
        connection.send(head("POST", "/unread", {"Host": "a", "Content-Length": str(10**9)}))
        assert connection.answer().body == b"ok"
        send_until_cut(connection, b"x")


def test_a_connection_goes_on_after_the_rest_of_a_body_nobody_waits_for(hurried: str) -> None:
    with Connection(hurried) as connection:
        connection.send(head("POST", "/unread", {"Host": "a", "Content-Length": "4"}))
        assert connection.answer().body == b"ok"
        connection.send(b"body")
        time.sleep(0.8)
        connection.ask("GET", "/")
        assert connection.answer("GET").body == b"ok"


@pytest.mark.parametrize("close", [{"Connection": "close"}, {}])
@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_who_still_sends_gets_the_answer(url: str, version: str, close: dict[str, str]) -> None:
    """A connection closed before everything was read takes what was sent along."""
    with Connection(url) as connection:
        headers = {"Host": "a", "Content-Length": str(LARGE), **close}
        connection.send(head("POST", "/unread", headers, version))
        for _ in range(LARGE // 100_000):
            connection.send(b"x" * 100_000)
        assert connection.answer().body == b"ok"


def test_an_answer_that_is_not_taken_is_given_up(hurried: str) -> None:
    with Connection(hurried, read_size=4096) as connection:
        connection.ask("GET", "/large")
        time.sleep(2.0)
        with pytest.raises((ConnectionError, http.client.IncompleteRead)):
            connection.answer("GET")


def test_an_answer_that_is_taken_slowly_comes_whole() -> None:
    with served(Application(), send_timeout=1.5) as url, Connection(url, read_size=4096) as connection:
        connection.ask("GET", "/huge")
        response, length = connection.begin("GET"), 0
        while part := response.read(HUGE // 40):
            length += len(part)
            time.sleep(0.08)
        assert length == HUGE


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"garbage\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100), 400),
        (b"GET / HTTP/1.1\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a\r\nno header\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: many\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\nabc", 400),
        (b"POST /unread HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\nabc", 400),
        (b"HEAD / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\nabc", 400),
        (b"GET /" + b"a" * 1_000_000 + b" HTTP/1.1\r\nHost: a\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\nHost: a\r\n" + b"A: b\r\n" * 200_000, 431),
    ],
)
def test_what_is_no_http_is_refused(url: str, sent: bytes, status: int, caplog: pytest.LogCaptureFixture) -> None:
    with Connection(url) as connection:
        connection.send(sent)
        answer = connection.answer("HEAD" if sent.startswith(b"HEAD") else "POST")
        assert answer.status == status
        assert sent.startswith(b"HEAD") or answer.error["type"] == "invalid_request_error"
        connection.half_close()
        assert connection.closed()
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_a_body_that_breaks_after_the_answer_ends_the_connection(url: str, caplog: pytest.LogCaptureFixture) -> None:
    with Connection(url) as connection:
        connection.send(head("POST", "/unread", {"Host": "a", "Transfer-Encoding": "chunked"}))
        assert connection.answer().body == b"ok"
        connection.send(b"ZZ\r\nabc")
        connection.half_close()
        assert connection.closed()
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_requests_sent_ahead_are_answered_in_their_order(url: str) -> None:
    with Connection(url) as connection:
        bodies = [str(n).encode() for n in range(40)]
        connection.send(b"".join(head("POST", "/", {"Host": "a", "Content-Length": str(len(b))}) + b for b in bodies))
        assert [connection.answer().body for _ in bodies] == bodies


@pytest.mark.parametrize("ahead", [b"", b"\r\n", b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"])
@pytest.mark.parametrize("leave", [Connection.close, Connection.reset, Connection.half_close])
def test_who_leaves_is_noticed(application: Application, url: str, ahead: bytes, leave: Any) -> None:
    """What was sent ahead, such as a line break after a body, hides it from who no longer reads."""
    path = f"/wait/{leave.__name__}/{len(ahead)}"
    with Connection(url) as connection:
        connection.ask("POST", path, b"a body")
        time.sleep(0.1)
        connection.send(ahead)
        time.sleep(0.1)
        leave(connection)
        wait_until(lambda: path in application.left)


def test_what_is_sent_ahead_is_not_kept_without_end(url: str) -> None:
    with Connection(url) as connection:
        connection.ask("POST", "/wait", b"a body")
        connection.socket.settimeout(1.0)
        with pytest.raises(TimeoutError):  # the systems' buffers are full, with less than 100 MB
            send_often(connection, b"x" * 100_000, 1_000)


def test_another_protocol_is_not_changed_to(url: str, caplog: pytest.LogCaptureFixture) -> None:
    with Connection(url) as connection:
        connection.ask("GET", "/", headers={"Connection": "Upgrade", "Upgrade": "websocket"})
        assert connection.answer("GET").body == b"ok"
    assert not caplog.records


@pytest.mark.parametrize("header", ["100-continue", "100-Continue"])
def test_a_body_is_asked_for_where_the_client_waits_for_that(url: str, header: str) -> None:
    with Connection(url) as connection:
        headers = {"Host": "a", "Content-Length": "4", "Expect": header}
        connection.send(head("POST", "/", headers))
        assert connection.socket.recv(1000).startswith(b"HTTP/1.1 100 ")
        connection.send(b"body")
        assert connection.answer().body == b"body"


def test_no_body_is_asked_for_where_nobody_reads_it(url: str) -> None:
    with Connection(url) as connection:
        connection.send(head("POST", "/unread", {"Host": "a", "Content-Length": "4", "Expect": "100-continue"}))
        assert connection.socket.recv(1000).startswith(b"HTTP/1.1 200 ")
