"""Servers that speak TLS, and what their clients may do."""

from __future__ import annotations

import http.client
import socket
import ssl
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from npu_zoo.testing.serving import RunningServer

from .certificates import make_certificate
from .protocol_server import LARGE, Application, served
from .raw_http import Connection, head, wait_until
from .real_server import LONG, PATH, SHORT, SMALL, metric, running

Certificate = tuple[Path, Path]


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    return make_certificate(tmp_path_factory.mktemp("tls"), "server")


@pytest.fixture(scope="module")
def context(certificate: Certificate) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=certificate[0])


@pytest.fixture(scope="module")
def url(certificate: Certificate) -> Iterator[str]:
    with served(Application(), certificate) as url:
        yield url


@pytest.fixture(scope="module")
def hurried(certificate: Certificate) -> Iterator[str]:
    with served(Application(), certificate, head_timeout=0.5, send_timeout=0.5) as url:
        yield url


def test_large_bodies_and_answers_arrive_whole(url: str, context: ssl.SSLContext) -> None:
    with Connection(url, context) as connection:
        connection.ask("POST", "/", b"y" * LARGE)
        assert connection.answer().body == b"y" * LARGE
        connection.ask("GET", "/large")
        assert len(connection.answer("GET").body) == LARGE


def test_a_head_that_does_not_come_is_given_up(hurried: str, context: ssl.SSLContext) -> None:
    with Connection(hurried, context) as connection:
        connection.send(b"GET / HTTP/1.1\r\n")
        assert connection.answer().status == 408


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_who_still_sends_gets_the_answer(url: str, context: ssl.SSLContext, version: str) -> None:
    with Connection(url, context) as connection:
        connection.send(head("POST", "/unread", {"Host": "a", "Content-Length": str(LARGE)}, version))
        for _ in range(LARGE // 100_000):
            connection.send(b"x" * 100_000)
        assert connection.answer().body == b"ok"


def test_an_answer_that_is_not_taken_is_given_up(hurried: str, context: ssl.SSLContext) -> None:
    with Connection(hurried, context, read_size=4096) as connection:
        connection.ask("GET", "/large")
        time.sleep(2.0)
        with pytest.raises((OSError, http.client.IncompleteRead)):
            connection.answer("GET")


def test_what_is_no_tls_ends_its_connection(url: str, context: ssl.SSLContext) -> None:
    with Connection(url.replace("https", "http")) as connection:
        connection.ask("GET", "/")
        assert connection.closed()
    with Connection(url, context) as connection:
        connection.ask("GET", "/")
        assert connection.answer("GET").body == b"ok"


class Served(NamedTuple):
    server: RunningServer
    context: ssl.SSLContext
    stranger: ssl.SSLContext


@pytest.fixture(scope="module")
def secured(certificate: Certificate, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server on an IPv6 address that asks its clients for certificates, a client with one, and one without."""
    own, key = make_certificate(tmp_path_factory.mktemp("client"), "client")
    context, stranger = (ssl.create_default_context(cafile=certificate[0]) for _ in range(2))
    context.load_cert_chain(own, key)
    arguments = [*SMALL, "--ssl-certfile", str(certificate[0]), "--ssl-keyfile", str(certificate[1])]
    arguments += ["--ssl-ca-certs", str(own), "--host", "::1"]
    with RunningServer(arguments, context=context) as server:
        yield Served(server, context, stranger)


@pytest.mark.slow
@pytest.mark.skipif(not socket.has_ipv6, reason="there is no IPv6 here")
def test_requests_over_tls(secured: Served) -> None:
    server, context, _ = secured
    assert server.url.startswith("https://[::1]:")
    with Connection(server.url, context) as connection:
        connection.post(PATH, SHORT)
        whole = connection.answer().texts
        connection.post(PATH, {**SHORT, "stream": True})
        assert [*connection.events()][-1] == "[DONE]"
        connection.post(PATH, SHORT)
        assert connection.answer().texts == whole


@pytest.mark.slow
@pytest.mark.skipif(not socket.has_ipv6, reason="there is no IPv6 here")
def test_a_client_over_tls_leaves(secured: Served) -> None:
    server, context, _ = secured
    for leave in (Connection.close, Connection.reset, Connection.half_close):
        with Connection(server.url, context) as connection:
            connection.post(PATH, {**LONG, "stream": True})
            next(connection.events())
            leave(connection)
            wait_until(lambda: running(server) == 0)
    assert metric(server, "npu_zoo_requests_aborted_total", reason="disconnect") == 3


def get_live(url: str, context: ssl.SSLContext) -> None:
    with Connection(url, context) as connection:
        connection.ask("GET", "/health/live")
        connection.answer("GET")


@pytest.mark.slow
@pytest.mark.skipif(not socket.has_ipv6, reason="there is no IPv6 here")
def test_a_client_without_a_certificate_is_refused(secured: Served) -> None:
    with pytest.raises((ssl.SSLError, ConnectionError)):
        get_live(secured.server.url, secured.stranger)
    assert secured.server.get("/health/live")[0] == 200
    assert "Traceback" not in secured.server.log
