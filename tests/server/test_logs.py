"""Logs: a line a record whatever is in it, no secrets, no prompts unless asked for."""

from __future__ import annotations

import io
import json
import logging
import logging.config
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from npu_zoo.core.engine import CompletionOutput, RequestMetrics, RequestOutput
from npu_zoo.core.errors import UsageError
from npu_zoo.server.logs import (
    LOGGER,
    MAX_VALUE_LENGTH,
    JsonFormatter,
    LogFormat,
    RequestLine,
    RequestLog,
    TextFormatter,
    log,
    logging_config,
    printable,
)

FORMATTERS = [JsonFormatter(), TextFormatter()]
SECRETS = ["sk-abcdefgh12345678", "hunter2hunter2", "eyJhbGciOiJIUzI1NiJ9.e30.x-_"]

ANY_TEXT = st.text(st.characters(), max_size=40)  # surrogates too
NASTY = st.sampled_from(["\n", "\r\n", "\x1b[2J", "\u2028", "\x85", "\u202e", "\ud800", "\x00", '"', "\\", "=", "\x7f"])
TEXT = st.lists(st.one_of(NASTY, ANY_TEXT), max_size=6).map("".join)


@pytest.fixture(autouse=True)
def loggers_as_before() -> Iterator[None]:
    names = ["", "npu_zoo", LOGGER, "uvicorn", "uvicorn.error", "uvicorn.access"]
    before = [(log := logging.getLogger(name), log.handlers[:], log.level, log.propagate) for name in names]
    yield
    for logger, handlers, level, propagate in before:
        for handler in set(logger.handlers) - set(handlers):
            handler.close()
        logger.handlers[:], logger.propagate = handlers, propagate
        logger.setLevel(level)


def logged(fmt: LogFormat, monkeypatch: pytest.MonkeyPatch, level: Any = "info") -> io.StringIO:
    """What goes to standard error from now on."""
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    logging.config.dictConfig(logging_config(fmt, level))
    return stream


def records(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def record(message: str = "said", error: BaseException | None = None, **fields: Any) -> logging.LogRecord:
    info = (type(error), error, error.__traceback__) if error else None
    made = logging.LogRecord(LOGGER, logging.INFO, "f.py", 1, "%s", (message,), info)
    made.event, made.fields = "request", fields
    return made


def output(text: str = "the answer", prompt: str = "the question") -> RequestOutput:
    metrics = RequestMetrics(10.0, 10.5, 12.0, cached_tokens=2, preemptions=1)
    return RequestOutput(
        "r", prompt, [1, 2, 3], [CompletionOutput(0, text, [4, 5], finish_reason="stop")], True, metrics
    )


LINE = RequestLine(
    "id-1", "POST", "/v1/completions", 200, 2.25, "10.0.0.1", "m", True, answer_id="cmpl-1", arrival_time=9.5
)


def test_a_request_s_line(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = logged("json", monkeypatch)
    RequestLog().ended(LINE, [output()])
    (found,) = records(stream)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", found.pop("time"))
    assert found == {
        "level": "info",
        "event": "request",
        "logger": LOGGER,
        "message": "POST /v1/completions 200",
        "request_id": "id-1",
        "answer_id": "cmpl-1",
        "method": "POST",
        "route": "/v1/completions",
        "status": 200,
        "client": "10.0.0.1",
        "model": "m",
        "stream": True,
        "error": None,
        "seconds": 2.25,
        "prompt_tokens": 3,
        "completion_tokens": 2,
        "cached_tokens": 2,
        "finish_reasons": ["stop"],
        "preemptions": 1,
        "queue_seconds": None,
        "ttft_seconds": 1.0,
        "total_seconds": 2.5,
    }


def test_texts_are_logged_whole_and_only_where_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = logged("json", monkeypatch)
    text = "x" * (MAX_VALUE_LENGTH + 10)
    RequestLog().ended(LINE, [output(text, text)])
    RequestLog(prompts=True).ended(LINE, [output(text, text)])
    plain, asked = records(stream)
    assert "xxx" not in json.dumps(plain)
    assert (asked["prompts"], asked["outputs"]) == ([text], [text])


@pytest.mark.parametrize(
    ("route", "status", "level"),
    [
        ("/v1/completions", 200, "info"),
        ("/v1/completions", 429, "info"),
        ("/v1/completions", 500, "error"),
        ("/metrics", 200, "debug"),
        ("/health/live", 200, "debug"),
        ("/health/ready", 503, "debug"),
        ("/health", 503, "debug"),
        ("/metrics", 500, "error"),
        (None, 404, "info"),
    ],
)
def test_levels(route: str | None, status: int, level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    line = RequestLine("id", "GET", route, status, 0.1)
    for least, expected in (("debug", [level]), ("critical", [])):
        stream = logged("json", monkeypatch, least)
        RequestLog().ended(line)
        assert [found["level"] for found in records(stream)] == expected


@given(TEXT, TEXT, st.dictionaries(TEXT, st.one_of(TEXT, st.floats(), st.integers(), st.lists(TEXT)), max_size=3))
def test_a_record_is_one_line_whatever_is_in_it(message: str, value: str, more: dict[str, Any]) -> None:
    for formatter in FORMATTERS:
        line = formatter.format(record(message, field=value, more=more))
        assert line.isprintable()
        line.encode()
        if isinstance(formatter, JsonFormatter):
            assert line.isascii()
            found = json.loads(line, parse_constant=pytest.fail)
            assert (found["event"], found["level"]) == ("request", "info")


@given(TEXT)
def test_a_traceback_cannot_pass_for_a_record(text: str) -> None:
    try:
        raise ValueError(text)
    except ValueError as error:
        made = record("failed", error)
    assert json.loads(FORMATTERS[0].format(made))["exception"].startswith("Traceback")
    head, *rest = FORMATTERS[1].format(made).split("\n")
    assert rest
    assert all(line.startswith("    ") and line.isprintable() for line in rest)
    assert head.isprintable()


def test_a_client_cannot_forge_a_field() -> None:
    line = TextFormatter().format(record(client='x status=200 request_id="y"', status=500))
    assert ' client="x status=200 request_id=\\"y\\"" status=500' in line
    assert json.loads(JsonFormatter().format(record(level="none", event="other", time=0)))["level"] == "info"


def test_values_are_cut() -> None:
    found = json.loads(JsonFormatter().format(record("m" * 10_000, path="p" * 10_000)))
    assert len(found["message"]) < MAX_VALUE_LENGTH + 20
    assert found["path"].endswith(f"… ({10_000 - MAX_VALUE_LENGTH} more)")


def test_numbers_that_are_none_in_json() -> None:
    found = json.loads(JsonFormatter().format(record(a=float("nan"), b=float("inf"), c=1.23456789)))
    assert (found["a"], found["b"], found["c"]) == (None, None, 1.234568)


@pytest.mark.parametrize("secret", SECRETS)
@pytest.mark.parametrize(
    "text",
    [
        "Authorization: Bearer {}",
        "authorization=Basic {} and more",
        "api_key={} and more",
        "api-key: '{}'\nnext line",
        "Authorization: {} more",
        "{{'Authorization': 'Bearer {}'}}",
        '{{"api_key": "{}"}}',
        "GET /v1/models?api_key={}&x=1",
        "X-API-Key: {}",
        "bearer   {}",
        "password={}",
    ],
)
def test_no_secret_is_logged(text: str, secret: str) -> None:
    try:
        raise ValueError(text.format(secret))
    except ValueError as error:
        made = record(text.format(secret), error, note=text.format(secret), notes=[text.format(secret)])
    for formatter in FORMATTERS:
        assert secret not in formatter.format(made)


@pytest.mark.parametrize(
    "name", ["authorization", "Api-Key", "x_api_key", "cookie", "password", "client_secret", "token"]
)
def test_a_field_that_is_named_like_a_secret_is_hidden(name: str) -> None:
    made = record(**{name: "plain-words", "headers": {name: "plain-words"}})
    for formatter in FORMATTERS:
        line = formatter.format(made)
        assert "plain-words" not in line
        assert "***" in line


def test_counts_of_tokens_are_no_secrets() -> None:
    found = json.loads(JsonFormatter().format(record(prompt_tokens=3, completion_tokens=4)))
    assert (found["prompt_tokens"], found["completion_tokens"]) == (3, 4)


class Body(BaseModel):
    n: int


@pytest.mark.parametrize("wrapped", [False, True])
def test_what_pydantic_quotes_of_a_body_is_not_logged(wrapped: bool) -> None:
    words = " ".join(["my", "private", "words"])
    try:
        try:
            Body.model_validate({"n": words})
        except ValidationError as error:
            if wrapped:
                raise RuntimeError(str(error)) from error
            raise
    except (ValidationError, RuntimeError) as error:
        made = record("failed", error)
    for formatter in FORMATTERS:
        line = formatter.format(made)
        assert words not in line
        assert "test_logs.py" in line
        assert type(made.exc_info[1]).__name__ in line  # type: ignore[index]


@pytest.mark.parametrize("fmt", ["json", "text"])
def test_uvicorn_logs_the_same_way(fmt: LogFormat, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = logged(fmt, monkeypatch)
    logging.getLogger("uvicorn.error").info("Started server process [%d]", 7, extra={"color_message": "x"})
    logging.getLogger("uvicorn.access").info('%s - "%s %s HTTP/%s" %d', "1.2.3.4", "GET", "/?api_key=x", "1.1", 200)
    logging.getLogger("asyncio").error("Task exception was never retrieved")
    first, last = stream.getvalue().splitlines()
    assert "Started server process [7]" in first
    assert "never retrieved" in last
    if fmt == "json":
        assert [found["logger"] for found in records(stream)] == ["uvicorn.error", "asyncio"]


def test_white_space_around_a_message_is_dropped() -> None:
    assert json.loads(JsonFormatter().format(record("Exception in ASGI application\n")))["message"].endswith("tion")


def test_uvicorn_takes_the_config() -> None:
    uvicorn = pytest.importorskip("uvicorn")
    uvicorn.Config("none:app", log_config=logging_config("json"))
    assert isinstance(logging.getLogger("uvicorn").handlers[0].formatter, JsonFormatter)


def test_a_file_is_appended_to_and_opened_anew_after_it_was_moved(tmp_path: Path) -> None:
    file = tmp_path / "server.log"
    file.write_text("before\n")
    logging.config.dictConfig(logging_config("json", file=file))
    logger = logging.getLogger(LOGGER)
    log(logger, logging.INFO, "one", "1")
    file.rename(tmp_path / "server.log.1")
    log(logger, logging.INFO, "two", "2")
    assert (tmp_path / "server.log.1").read_text().startswith("before\n{")
    assert [json.loads(line)["event"] for line in file.read_text().splitlines()] == ["two"]


def test_a_file_that_cannot_be_written_is_refused_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot write the log to .*none/x\.log: No such file"):
        logging_config(file=tmp_path / "none" / "x.log")


def test_arguments_that_do_not_fit_a_message_lose_no_record() -> None:
    made = logging.LogRecord("other", logging.INFO, "f.py", 1, "%d of %d", ("x",), None)
    assert json.loads(JsonFormatter().format(made))["message"] == "%d of %d"


@given(TEXT)
def test_printable(text: str) -> None:
    shown = printable(text)
    assert shown.isprintable()
    assert shown == text or not text.isprintable()
