"""What `npu-zoo serve` says where it cannot serve as it was told, before a model is loaded."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from npu_zoo.server.supervisor import Supervisor

from ..server.certificates import make_certificate

Cli = Callable[..., Any]
DEMO = ("serve", "--model", "deepseek_coder", "--hardware", "cpu", "--dtype", "float32")


@pytest.fixture(autouse=True)
def _no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(supervisor: Supervisor) -> int:
        supervisor._listener.close()
        raise AssertionError("it was started")

    monkeypatch.setattr(Supervisor, "run", run)


def assert_refused(ran: Any, code: int, *said: str) -> None:
    assert ran.code == code, ran.err
    assert not [words for words in said if words not in ran.err], ran.err
    assert "Traceback" not in ran.err
    assert "unexpected" not in ran.err


def test_a_port_in_use(cli: Cli) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert_refused(cli(*DEMO, "--port", port), 4, f"port {port} of 127.0.0.1 is in use by", "choose another one")


@pytest.mark.parametrize("host", ["nowhere.invalid", "192.0.2.1", "", ".", "a" * 64 + ".example", "fe80::1", "[::1]"])
def test_an_address_that_is_not_of_this_machine(cli: Cli, host: str) -> None:
    assert_refused(
        cli(*DEMO, "--port", "0", "--host", host), 2, f"cannot listen on port 0 of '{host}'", "name an address"
    )


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--port", "65536"),
        ("--port", "-1"),
        ("--port", "http"),
        ("--max-queue", "-1"),
        ("--max-body-size", "100"),
        ("--rate-limit", "0"),
        ("--concurrency-limit", "0"),
        ("--request-timeout", "0"),
        ("--head-timeout", "nan"),
        ("--body-timeout", "inf"),
        ("--send-timeout", "-3"),
        ("--keep-alive", "0"),
        ("--grace", "-1"),
        ("--log-format", "xml"),
        ("--log-level", "all"),
    ],
)
def test_a_value_that_is_out_of_its_range(cli: Cli, option: str, value: str) -> None:
    assert_refused(cli(*DEMO, option, value), 2, option)


@pytest.mark.parametrize("content", [None, b"", b"# none\n\n", b"\xff\xfe"])
def test_a_file_of_keys_that_holds_none(cli: Cli, tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "keys"
    if content is not None:
        file.write_bytes(content)
    assert_refused(cli(*DEMO, "--api-key-file", str(file)), 2, str(file), "API key")


def test_tls_files_that_cannot_be_used(cli: Cli, tmp_path: Path) -> None:
    certificate, key = make_certificate(tmp_path, "server")
    _, other = make_certificate(tmp_path, "other")
    locked, locked_key = make_certificate(tmp_path, "locked", password="secret")
    missing, garbage = tmp_path / "missing", tmp_path / "garbage"
    garbage.write_bytes(bytes(range(256)))
    pairs = [(missing, key), (certificate, missing), (certificate, other), (certificate, None)]
    pairs += [(garbage, key), (certificate, garbage), (key, certificate), (tmp_path, key), (locked, locked_key)]
    for chain, secret in pairs:
        arguments = ["--ssl-certfile", str(chain), *(["--ssl-keyfile", str(secret)] if secret else [])]
        assert_refused(cli(*DEMO, *arguments), 2, "TLS", str(chain))
    assert "has a password" in cli(*DEMO, "--ssl-certfile", str(locked), "--ssl-keyfile", str(locked_key)).err
    for authorities in (missing, garbage, key):
        arguments = ["--ssl-certfile", str(certificate), "--ssl-keyfile", str(key), "--ssl-ca-certs", str(authorities)]
        assert_refused(cli(*DEMO, *arguments), 2, "TLS", str(authorities))


@pytest.mark.parametrize("option", ["--ssl-keyfile", "--ssl-ca-certs"])
def test_a_key_without_a_certificate(cli: Cli, tmp_path: Path, option: str) -> None:
    assert_refused(cli(*DEMO, option, str(tmp_path / "key")), 2, "ssl_certfile")


def test_an_unknown_variable(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NPU_ZOO_HOTS", "0.0.0.0")
    assert_refused(cli(*DEMO), 2, "NPU_ZOO_HOTS is no setting")


def test_a_log_that_cannot_be_written(cli: Cli, tmp_path: Path) -> None:
    assert_refused(cli(*DEMO, "--port", "0", "--log-file", str(tmp_path / "no" / "log")), 2, "cannot write the log")


def test_a_collector_that_is_no_address(cli: Cli) -> None:
    assert_refused(cli(*DEMO, "--port", "0", "--otlp-endpoint", "collector"), 2, "collector")


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "localhost", "::1"])
def test_who_listens_on_the_loopback_is_not_warned(cli: Cli, host: str) -> None:
    ran = cli(*DEMO, "--port", "0", "--host", host)
    assert "can be reached" not in ran.err
    assert "it was started" in ran.err


def test_who_listens_elsewhere_without_keys_is_warned(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "0.0.0.0 can be reached from other machines" in cli(*DEMO, "--port", "0", "--host", "0.0.0.0").err
    monkeypatch.setenv("NPU_ZOO_API_KEY", " ")
    assert "can be reached" in cli(*DEMO, "--port", "0", "--host", "0.0.0.0").err
    monkeypatch.setenv("NPU_ZOO_API_KEY", "ours")
    assert "can be reached" not in cli(*DEMO, "--port", "0", "--host", "0.0.0.0").err
